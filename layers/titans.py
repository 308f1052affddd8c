"""Titans neural memory as a token mixer (arXiv 2501.00663, sections 3 and 4.4).

Keys, values and queries are projected, convolved, passed through SiLU and l2-normalised; per-token,
per-head gates drive the memory; its read is normalised, gated and projected:

    eta_t = sigmoid(x_t w_eta),  alpha_t = sigmoid(x_t w_alpha),  theta_t = max_lr sigmoid(x_t w_theta) (1 - eta_t)
    S_t = eta_t S_{t-1} - theta_t grad 1/2 ||M(k_t) - v_t||^2        (eq. 14; the gradient at the chunk's anchor)
    M_t = (1 - alpha_t) M_{t-1} + S_t                                (eq. 13)
    y_t = W_o (norm(M_t(q_t)) * silu(x_t W_g))                       (eq. 15)

The paper leaves the range of theta open. A key repeated through a chunk of b tokens is written b times against one
anchor, and each write acts 1 / (1 - eta) times through the momentum: with b theta / (1 - eta) times the curvature of
the inner loss above about 2 the inner gradient descent diverges. Hence the factor (1 - eta_t), max_lr = 1 / 2b by
default, and values of unit length too: long values make large weights, and those the curvature (without it a byte-level
run diverged at step 41). The norm of the read makes its length irrelevant.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers.conv import ShortConv
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.modules import l2_normalise, projection, rms_norm
from engrax.layers.segments import last_segment_after, select_rows, starts_anew
from engrax.pallas_kernels import NeuralMemoryState, neural_memory
from engrax.pallas_kernels.neural_memory import cost


class TitansState(NamedTuple):
    """Everything the mixer needs to continue at any position; its size does not depend on T."""

    memory: NeuralMemoryState
    tail: Float[Array, "B W C"]  # the last conv_width - 1 projected tokens (q, k and v side by side)
    last_segment: Int[Array, " B"]


@MIXERS.register("titans")
@dataclasses.dataclass(frozen=True)
class TitansConfig(MixerConfig):
    """Settings of the Titans neural memory."""

    heads: int = 4  # independent memories
    head_dim: int = 32  # key and value width of a head
    hidden: int = 64  # width of the memory MLP's inner layers, per head
    depth: int = 2  # layers of the memory MLP, 1 (a matrix) to 4
    chunk_size: int = 16  # tokens whose gradients are taken at one anchor
    conv_width: int = 4  # taps of the short convolution; 1 = none
    persistent_tokens: int = 0  # learned tokens written into the memory before every segment
    max_lr: float | None = None  # upper bound of theta / (1 - eta), per token; None = 0.5 / chunk_size
    lr_init: float = 0.5  # theta at the start, as a fraction of that bound
    forget_init: float = 0.001  # alpha at the start, per token (the middle head's)
    momentum: bool = True  # False: eta = 0
    forgetting: bool = True  # False: alpha = 0
    activation: str = "gelu"  # of the memory MLP
    save_every: int = 1  # chunks between saved states in the backward pass; more = less memory, more recomputing
    implementation: str | None = (
        None  # of the operation neural_memory: reference | xla | ...; None = chosen by platform
    )

    def __post_init__(self):
        if not 1 <= self.depth <= 4:
            raise UserError(f"depth={self.depth} of the memory MLP must be 1 to 4.")
        for name in ("heads", "head_dim", "hidden", "chunk_size", "conv_width", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("lr_init", "forget_init"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must lie between 0 and 1, both excluded.")
        if self.max_lr is not None and self.max_lr <= 0:
            raise UserError(f"max_lr={self.max_lr} must be positive (None = 0.5 / chunk_size).")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Titans":
        return Titans(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["TitansConfig", ...]:
        small = cls(heads=2, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3)
        return (
            small,
            dataclasses.replace(small, depth=1, persistent_tokens=0, conv_width=1),
            dataclasses.replace(small, depth=4, momentum=False, forgetting=False, chunk_size=4),
            cls(),
        )

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Widths between the memory's layers: (head_dim, hidden, ..., head_dim)."""
        return (self.head_dim, *[self.hidden] * (self.depth - 1), self.head_dim)

    @property
    def gates(self) -> int:
        """Gates per head: the learning rate and, where they are on, momentum and forgetting."""
        return 1 + self.momentum + self.forgetting

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        inner = self.heads * self.head_dim
        project = 2 * dim * (5 * inner + self.gates * self.heads) + 2 * self.conv_width * 3 * inner
        memory = cost.flops(
            batch=1,
            seq=seq_len,
            heads=self.heads,
            key=self.head_dim,
            value=self.head_dim,
            hidden=self.hidden,
            depth=self.depth,
            chunk_size=self.chunk_size,
            segments=True,  # rows are packed
        )
        return project + memory.forward / seq_len


class Titans(nnx.Module):
    """The module of TitansConfig: x [B, T, D] -> y [B, T, D], TitansState."""

    def __init__(self, config: TitansConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        H, inner = config.heads, config.heads * config.head_dim
        self.qkv = projection(dim, 3 * inner, ("embed", "heads"), rngs=rngs)
        self.conv = ShortConv(3 * inner, config.conv_width, rngs=rngs)
        self.gates = projection(dim, config.gates * H, ("embed", "heads"), rngs=rngs, scale=0.1)
        # eta = 0.5 and alpha = forget_init at the start, spread over the heads so that they differ in time scale.
        spread = jnp.linspace(-1.0, 1.0, H)
        bias = [jnp.full(H, _logit(config.lr_init))]
        bias += [spread] if config.momentum else []
        bias += [_logit(config.forget_init) + spread] if config.forgetting else []
        self.gate_bias = nnx.Param(jnp.stack(bias), axes=("gate", "heads"))
        # The last layer starts at zero, so that what is read is what was written and not the initial function.
        widths = config.layer_widths
        scales = [*[2**0.5] * (config.depth - 1), 0.0]
        self.initial = nnx.List(
            nnx.Param(
                s * jax.random.normal(rngs.params(), (H, a, b)) * a**-0.5, axes=("heads", "memory_in", "memory_out")
            )
            for s, a, b in zip(scales, widths[:-1], widths[1:])
        )
        if config.persistent_tokens:
            self.persistent = nnx.Param(
                jax.random.normal(rngs.params(), (config.persistent_tokens, dim)), axes=("persistent", "embed")
            )
        self.norm = rms_norm(config.head_dim, rngs=rngs)
        self.gate = projection(dim, inner, ("embed", "heads"), rngs=rngs)
        self.out = projection(inner, dim, ("heads", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def reset_state(self) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        """(weights, momentum), tuples of [H, in, out]: the learned memory after the persistent tokens were written."""
        memory = self._learned_memory()
        if self.config.persistent_tokens:
            x_1PD = self.persistent[...][None]
            _, state, _ = self._run(x_1PD, memory, self.conv.init_tail(1, x_1PD.dtype))
            memory = state
        return tuple(w[0] for w in memory.weights), tuple(s[0] for s in memory.momentum)

    def init_state(self, batch_size: int) -> TitansState:
        """The state every row and every segment starts from, at phase 0."""
        return self._start(self.reset_state(), batch_size)

    def _start(self, reset, batch_size: int) -> TitansState:
        weights, momentum = reset
        return TitansState(
            memory=NeuralMemoryState.start(weights, batch_size, momentum),
            tail=self.conv.init_tail(batch_size, self.qkv.kernel.dtype),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: TitansState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], TitansState]:
        """Writes and reads every token; a new segment starts from `reset_state()`. Padding (-1) gives 0."""
        read, state, _ = self._mix(x_BTD, state, segment_ids)
        return self._project_read(x_BTD, read), state

    def report(
        self, x_BTD: Float[Array, "B T D"], state: TitansState | None = None, segment_ids=None
    ) -> dict[str, Array]:
        """Diagnostics of one call: gate means, how often they saturate, surprise before and memory norms after it."""
        before = self.init_state(x_BTD.shape[0]) if state is None else state
        _, after, (q, k, v, gates) = self._mix(x_BTD, state, segment_ids)
        lr, momentum, forget = gates
        saturated = lambda g: jnp.mean((g < 0.01) | (g > 0.99))  # noqa: E731
        norm = lambda xs: jnp.sqrt(sum(jnp.mean(jnp.sum(x * x, axis=(-2, -1))) for x in xs))  # noqa: E731
        no_write = {"lr": jnp.zeros_like(lr), "momentum": jnp.zeros_like(lr), "forget": jnp.zeros_like(lr)}
        recall = {}
        for when, memory in (("before", before.memory), ("after", after.memory)):
            held = NeuralMemoryState(
                memory.weights,
                jax.tree.map(jnp.zeros_like, memory.momentum),
                memory.weights,
                np.zeros(len(x_BTD), np.int32),
            )
            predicted, _ = self._op(k, k, v, held, **no_write)
            recall[f"surprise_{when}"] = 0.5 * jnp.mean(jnp.sum((predicted - v) ** 2, axis=-1).astype(jnp.float32))
        return recall | {
            "lr_mean": jnp.mean(lr),
            "momentum_mean": jnp.mean(momentum),
            "forget_mean": jnp.mean(forget),
            "forget_saturated": saturated(forget),
            "memory_norm": norm(after.memory.weights),
            "momentum_norm": norm(after.memory.momentum),
        }

    def _mix(self, x_BTD, state, segment_ids):
        """Returns the memory's reads [B, T, H, K], the new state, and (q, k, v, gates)."""
        B = x_BTD.shape[0]
        fresh = state is None
        reset = None if segment_ids is None and not fresh else self.reset_state()
        state = self._start(reset, B) if fresh else state
        memory, tail = state.memory, state.tail
        if segment_ids is None:
            last = jnp.maximum(state.last_segment, 0)
            reset = None
        else:
            last = last_segment_after(state.last_segment, segment_ids)
            if not fresh:
                start = self._start(reset, B)
                anew = starts_anew(state.last_segment, segment_ids)
                blank = start.memory._replace(phase=memory.phase)  # the chunk grid is the row's and runs on
                memory = select_rows(anew, blank, memory)
                tail = select_rows(anew, start.tail, tail)
        q_k_v, gates, tail = self._project(x_BTD, tail, segment_ids)
        lr, momentum, forget = gates
        read, memory = self._op(
            *q_k_v, memory, lr=lr, momentum=momentum, forget=forget, reset=reset, segment_ids=segment_ids
        )
        return read, TitansState(memory, tail, last), (*q_k_v, gates)

    def _run(self, x_BTD, memory: NeuralMemoryState, tail):
        """Writes tokens into a memory from given tails: (reads, memory, tail)."""
        q_k_v, (lr, momentum, forget), tail = self._project(x_BTD, tail, None)
        read, memory = self._op(*q_k_v, memory, lr=lr, momentum=momentum, forget=forget)
        return read, memory, tail

    def _op(self, q, k, v, memory, **gates):
        c = self.config
        return neural_memory(
            q,
            k,
            v,
            state=memory,
            activation=c.activation,
            chunk_size=c.chunk_size,
            save_every=c.save_every,
            implementation=c.implementation,
            **gates,
        )

    def _project(self, x_BTD, tail, segment_ids):
        """Returns (q, k, v) each [B, T, H, K], the gates (lr, momentum, forget) each [B, T, H], and the new tail."""
        c = self.config
        B, T, _ = x_BTD.shape
        mixed, tail = self.conv(self.qkv(x_BTD), tail, segment_ids)
        q, k, v = (y.reshape(B, T, c.heads, c.head_dim) for y in jnp.split(jax.nn.silu(mixed), 3, axis=-1))
        logits = self.gates(x_BTD).reshape(B, T, c.gates, c.heads).astype(self._state_dtype()) + self.gate_bias[...]
        lr, *others = jnp.moveaxis(jax.nn.sigmoid(logits), 2, 0)
        momentum = others.pop(0) if c.momentum else jnp.zeros_like(lr)
        forget = others.pop(0) if c.forgetting else jnp.zeros_like(lr)
        lr = (c.max_lr or 0.5 / c.chunk_size) * lr * (1 - momentum)
        return (l2_normalise(q), l2_normalise(k), l2_normalise(v)), (lr, momentum, forget), tail

    def _project_read(self, x_BTD, read_BTHK):
        y = self.norm(read_BTHK).reshape(*x_BTD.shape[:2], -1)
        return self.out(y * jax.nn.silu(self.gate(x_BTD)))

    def _state_dtype(self):
        return jnp.promote_types(self.qkv.kernel.dtype, jnp.float32)

    def _learned_memory(self) -> NeuralMemoryState:
        """The learned initial memory of one row [1, H, in, out], without momentum."""
        return NeuralMemoryState.start(tuple(w[...].astype(self._state_dtype()) for w in self.initial), 1)


def _logit(p: float) -> float:
    return math.log(p / (1 - p))
