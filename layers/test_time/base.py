"""The mixer around a memory that is trained at test time (Titans, arXiv 2501.00663, section 4.4).

Keys, values and queries are projected, convolved, passed through SiLU and normalised to length 1. Persistent tokens are
written first, in separate chunks. The read is normalised, gated and projected. A subclass defines the memory's rule and
gates. `operation` runs the memory if the operation `neural_memory` has this rule, else `engine`.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.layers.common.conv import ShortConv
from engrax.layers.common.modules import l2_normalise, projection, rms_norm
from engrax.layers.common.segments import last_segment_after, select_rows, starts_anew
from engrax.layers.mixer import Mixer
from engrax.layers.test_time import engine, operation
from engrax.layers.test_time.rule import Matrices
from engrax.pallas_kernels.neural_memory.decode import DecodingMemory


def logit(p: float) -> float:
    """Returns x with sigmoid(x) = p, for p in (0, 1): the initial bias of a gate."""
    return math.log(p / (1 - p))


def default_lr_bound(chunk_size: int, depth: int) -> float:
    """Returns the upper bound of a token's step size for a memory MLP of `depth` layers: 1 / (2 chunk_size), halved for
    every hidden-to-hidden layer, so a key that fills its chunk does not overshoot (docs/titans.md)."""
    return 0.5 / chunk_size / 2 ** max(depth - 2, 0)


class ShellState(NamedTuple):
    """Everything the mixer needs to continue at any position; its size does not depend on T."""

    memory: Any  # every leaf [B, ...]
    tail: Float[Array, "B W C"]  # the last conv_width - 1 projected tokens (q, k and v side by side)
    last_segment: Int[Array, " B"]


class TestTimeMixerBase(Mixer):
    """Base of the mixers with a test-time memory: x [B, T, D] -> y [B, T, D], ShellState.

    The config has heads, head_dim, conv_width, output_gate, persistent_tokens and `rule()`. A subclass defines
    `_add_memory`, `_learned_matrices`, `_gates` and `_memory`.
    """

    def __init__(self, config, dim: int, *, gates: int, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        inner = config.heads * config.head_dim
        self.qkv = projection(dim, 3 * inner, ("embed", "heads"), rngs=rngs, widths=(inner,) * 3)
        self.conv = ShortConv(3 * inner, config.conv_width, rngs=rngs, widths=(inner,) * 3)
        parts = (config.heads,) * (gates // config.heads)
        self.gates = projection(dim, gates, ("embed", "heads"), rngs=rngs, scale=0.1, wide=True, parts=parts)
        self._add_memory(rngs)
        if config.persistent_tokens:
            self.persistent = nnx.Param(
                jax.random.normal(rngs.params(), (config.persistent_tokens, dim)),
                axes=("persistent", "embed"),
                role="initial memory",
            )
        self.norm = rms_norm(config.head_dim, rngs=rngs)
        if config.output_gate:
            self.gate = projection(dim, inner, ("embed", "heads"), rngs=rngs)
        self.out = projection(inner, dim, ("heads", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def _add_memory(self, rngs: nnx.Rngs) -> None:
        """Adds the memory's own parameters."""
        raise NotImplementedError

    def _learned_matrices(self) -> Matrices:
        """Returns the learned initial memory `[H, I, O]`, by the names that its structure gives."""
        raise NotImplementedError

    def _gates(self, x_BTD: Float[Array, "B T D"]):
        """Returns the gates of every token, a pytree of [B, T, H, ...]."""
        raise NotImplementedError

    def _memory(self, q, k, v, gates, memory, reset, segment_ids):
        """Writes and reads q, k, v `[B, T, H, K]`. Returns (reads, memory).

        reset: the initial memory of new segments, for one row; None if no segment can start.
        """
        raise NotImplementedError

    @property
    def _engine(self):
        """The module that runs the memory's rule: `operation` or `engine`."""
        return operation if self.config.rule().operation else engine

    def reset_state(self):
        """Returns the initial memory of every segment, for one row, with the persistent tokens written."""
        rule, matrices = self.config.rule(), self._learned_matrices()
        dtype = self._state_dtype()
        memory = self._engine.start_state(rule, {name: w.astype(dtype) for name, w in matrices.items()}, 1)
        if self.config.persistent_tokens:
            x_1PD = self.persistent[...][None]
            q_k_v, _ = self._project(x_1PD, self.conv.init_tail(1, x_1PD.dtype), None)
            _, memory = self._memory(*q_k_v, self._gates(x_1PD), memory, None, None)
        return self._engine.close(rule, memory)

    def init_state(self, batch_size: int) -> ShellState:
        """Returns the state every row and every segment starts from, at phase 0."""
        return self._start(self.reset_state(), batch_size)

    def _start(self, reset, batch_size: int) -> ShellState:
        return ShellState(
            memory=self._engine.spread(self.config.rule(), reset, batch_size),
            tail=self.conv.init_tail(batch_size, self.qkv.kernel.dtype),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def open_state(self, state: ShellState) -> ShellState:
        rule = self.config.rule()
        return state._replace(memory=operation.opened(rule, state.memory)) if rule.operation else state

    def close_state(self, state: ShellState) -> ShellState:
        return state._replace(memory=operation.closed(state.memory))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: ShellState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], ShellState]:
        """Writes and reads every token; a new segment starts from `reset_state()`. Padding (-1) gives 0."""
        if segment_ids is not None:
            x_BTD = jnp.where((segment_ids >= 0)[..., None], x_BTD, 0)  # padding may hold any value, also NaN
        read, state, _ = self._mix(x_BTD, state, segment_ids)
        return self._project_read(x_BTD, read), state

    def errors_by_token(self, x_BTD, state: ShellState | None, segment_ids) -> dict[str, Float[Array, "B T"]]:
        """1/2 |M(key) - target|^2 of every token's write, for the memory before and after that write.

        NaN at padding, and if the previous token is not in the segment: nothing was written yet.
        """
        q_k_v, gates, memory, reset, _, _ = self._prepare(x_BTD, state, segment_ids)
        _, k, v = q_k_v
        key, target = self._written(k, v)
        ahead = jnp.concatenate([key[:, 1:], key[:, :1]], axis=1)  # M_t read at the key of token t + 1
        before, after = (self._memory(q, k, v, gates, memory, reset, segment_ids)[0] for q in (ahead, key))
        before = jnp.concatenate([before[:, -1:], before[:, :-1]], axis=1)
        follows = jnp.arange(x_BTD.shape[1]) > 0
        if segment_ids is not None:
            same = segment_ids == jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            follows = follows & same & (segment_ids >= 0)
        error = lambda read: 0.5 * jnp.mean(jnp.sum((read - target).astype(jnp.float32) ** 2, axis=-1), axis=-1)  # noqa: E731
        return {
            "error_before_write": jnp.where(follows, error(before), jnp.nan),
            "error_after_write": jnp.where(follows, error(after), jnp.nan),
        }

    def _written(self, k, v):
        """Returns the key and the target of every token's write, [B, T, H, K] each."""
        return k, v

    def _mix(self, x_BTD, state, segment_ids):
        """Returns the memory's reads [B, T, H, K], the new state, and (q, k, v, gates)."""
        q_k_v, gates, memory, reset, tail, last = self._prepare(x_BTD, state, segment_ids)
        read, memory = self._memory(*q_k_v, gates, memory, reset, segment_ids)
        return read, ShellState(memory, tail, last), (*q_k_v, gates)

    def _prepare(self, x_BTD, state, segment_ids):
        """Returns (q, k, v), the gates, the memory to begin with and to reset to, the new tail and last segment."""
        fresh = state is None
        decoding = not fresh and isinstance(state.memory, DecodingMemory)  # no segment starts
        resets = segment_ids is not None and not decoding
        reset = self.reset_state() if fresh or resets or self.config.rule().reset_every else None
        state = self._start(reset, len(x_BTD)) if fresh else state
        memory, tail = state.memory, state.tail
        if segment_ids is None:
            last = jnp.maximum(state.last_segment, 0)
        else:
            last = last_segment_after(state.last_segment, segment_ids)
            if resets and not fresh:
                start = self._start(reset, len(x_BTD))
                anew = starts_anew(state.last_segment, segment_ids)
                memory = select_rows(anew, self._engine.at_place_of(start.memory, memory), memory)
                tail = select_rows(anew, start.tail, tail)
        q_k_v, tail = self._project(x_BTD, tail, segment_ids)
        return q_k_v, self._gates(x_BTD), memory, reset, tail, last

    def _project(self, x_BTD, tail, segment_ids):
        """Returns (q, k, v) each [B, T, H, K], of length 1, and the new tail."""
        mixed, tail = self.conv(self.qkv(x_BTD), tail, segment_ids)
        return self._activate(mixed), tail

    def _activate(self, mixed_BTC):
        """Returns (q, k, v) each [B, T, H, K], of length 1, from what the convolution gives."""
        heads = (*mixed_BTC.shape[:2], self.config.heads, self.config.head_dim)
        return [l2_normalise(y.reshape(heads)) for y in jnp.split(jax.nn.silu(mixed_BTC), 3, axis=-1)]

    def _project_read(self, x_BTD, read_BTHK):
        y = self.norm(read_BTHK).reshape(*x_BTD.shape[:2], -1)
        return self.out(y * jax.nn.silu(self.gate(x_BTD)) if self.config.output_gate else y)

    def _state_dtype(self):
        return jnp.promote_types(self.qkv.kernel.dtype, jnp.float32)
