"""The shared part of mixers with a matrix memory: all but the equation.

Tokens are projected to queries, keys and values, optionally convolved, and written into and read from a matrix by the
operation `linear_attention` or `gated_delta_rule`. The read is normalised, gated and projected:

    [q, k, v]_t = conv(x W_qkv)_t,   o_t = the operation,   y_t = W_o (norm(o_t) * act(x_t W_gate))

A mixer is a config (`MatrixMemoryConfig`) and a module (`MatrixMemory`) that defines the rest: the map of q, k and v
(`features`) and their gates (`gate_projections`, `gates`), or both at once (`tokens`).
"""

import dataclasses
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError, require_positive
from engrax.layers.common import sequence
from engrax.layers.common.conv import ShortConv
from engrax.layers.common.modules import projection, rms_norm
from engrax.layers.common.segments import last_segment_after, select_rows, starts_anew
from engrax.layers.common.split_operation import DECAY, DELTA, split_operation
from engrax.layers.mixer import Mixer, MixerConfig
from engrax.pallas_kernels import gated_delta_rule, linear_attention
from engrax.pallas_kernels.common.segments import mask_tokens
from engrax.pallas_kernels.gated_delta_rule import cost as delta_cost
from engrax.pallas_kernels.linear_attention import cost as linear_cost

OPERATIONS = {  # the operation, its FLOPs, and how it composes over the pieces of a row
    "linear": (linear_attention, linear_cost.flops, DECAY),
    "delta": (gated_delta_rule, delta_cost.flops, DELTA),
}


class MatrixMemoryState(NamedTuple):
    """Everything the mixer needs to continue at any position; its size does not depend on T."""

    memory: tuple[Float[Array, "B ..."], ...]  # the matrices [B, HV, K, V], one for each pass of the operation, first
    tail: Float[Array, "B W C"]  # the last conv_width - 1 projected tokens (q, k and v side by side)
    place: Int[Array, " B"] | None  # tokens of the row's last segment so far; None if the mixer does not count them
    last_segment: Int[Array, " B"]


class Matrix(NamedTuple):
    """The sizes of one pass of the operation."""

    query_heads: int  # of queries and keys
    heads: int  # of values, and matrices
    key: int  # features of a key
    value: int  # features of a value


@dataclasses.dataclass(frozen=True)
class MatrixMemoryConfig(MixerConfig):
    """Settings of every mixer with a matrix memory."""

    heads: int = 4  # query and key heads
    value_heads: int | None = None  # value heads, each with its own matrix, a multiple of heads; None = heads
    head_dim: int = 32  # key width of a head
    value_dim: int | None = None  # value width of a head; None = head_dim
    chunk_size: int = 16  # tokens worked on at once; changes rounding and speed, not the result
    conv_width: int = 1  # taps of the short convolution on q, k and v; 1 = none
    conv_bias: bool = False  # whether the convolution has a bias
    output_gate: bool = False  # whether the read is gated by a projection of the input
    norm_eps: float = 1e-6  # added to the variance in the norm of the read
    implementation: str | None = None  # of the operation: reference | xla | ...; None = chosen by platform

    operation: ClassVar[Literal["linear", "delta"]] = "linear"  # what the mixer runs on: `OPERATIONS`
    composes: ClassVar[bool] = True  # False for a module that combines tokens outside the convolution and the operation
    routable: ClassVar[bool] = False  # whether the module has `features` and `gates`, so that MoM can route to it

    def __post_init__(self):
        for name in ("heads", "head_dim", "chunk_size", "conv_width"):
            self.at_least_one(name)
        for name in ("value_heads", "value_dim"):
            if getattr(self, name) is not None:
                self.at_least_one(name)
        require_positive(self, "norm_eps")
        if self.values[0] % self.heads:
            raise UserError(f"value_heads={self.value_heads} is not a multiple of heads={self.heads}; choose one.")

    def at_least_one(self, name: str):
        """Raises UserError unless the field is 1 or more."""
        if getattr(self, name) < 1:
            raise UserError(f"{name}={getattr(self, name)} must be at least 1.")

    def of_heads(self, shares: int) -> "MatrixMemoryConfig":
        return self.with_heads_cut(shares, ("heads", "value_heads"))

    @property
    def values(self) -> tuple[int, int]:
        """Value heads and the width of each."""
        return self.value_heads or self.heads, self.value_dim or self.head_dim

    @property
    def widths(self) -> tuple[int, int, int]:
        """Channels of the projections q, k and v."""
        heads, value = self.values
        return self.heads * self.head_dim, self.heads * self.head_dim, heads * value

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        """The passes of the operation."""
        return (Matrix(self.heads, self.values[0], self.head_dim, self.values[1]),)

    def gate_multiplies(self, dim: int) -> int:
        """Multiply-adds per token of the projections of gates, without the output gate."""
        return 0

    def output_multiplies(self, dim: int) -> int:
        """Multiply-adds per token of the output's projection and its gate."""
        return dim * self.widths[2] * (1 + self.output_gate)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        project = dim * sum(self.widths) + self.output_multiplies(dim) + self.gate_multiplies(dim)
        if self.conv_width > 1:
            project += self.conv_width * sum(self.widths)
        return 2 * project + self.memory_flops(seq_len)

    def operation_flops(self, **sizes: int) -> float:
        """Forward FLOPs of one pass of the operation."""
        return OPERATIONS[self.operation][1](**sizes).forward

    def memory_flops(self, seq_len: int) -> float:
        """Forward FLOPs per token of the passes of the operation."""
        memory = 0.0
        for m in self.matrices:
            sizes = dict(heads=m.heads, query_heads=m.query_heads, key=m.key, value=m.value)
            memory += self.operation_flops(batch=1, seq=seq_len, chunk_size=self.chunk_size, **sizes)
        return memory / seq_len


class MatrixMemory(Mixer):
    """x [B, T, D] -> y [B, T, D], MatrixMemoryState. A subclass gives `features` and its gates, or `tokens`."""

    counts_tokens = False  # whether `tokens` needs the positions of the tokens in their segments
    norm_width = "head"  # the read is normalised over: each "head", "all" heads together, or "none"
    gate_activation = staticmethod(jax.nn.silu)

    def __init__(self, config: Any, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        inner = config.widths[2]
        self.qkv = projection(dim, sum(config.widths), ("embed", "heads"), rngs=rngs, widths=config.widths)
        if config.conv_width > 1:
            self.conv = ShortConv(
                sum(config.widths), config.conv_width, rngs=rngs, bias=config.conv_bias, widths=config.widths
            )
        if self.norm_width == "head":
            self.norm = rms_norm(config.values[1], rngs=rngs, eps=config.norm_eps)
        if self.norm_width == "all":
            self.norm = rms_norm(inner, rngs=rngs, eps=config.norm_eps, axis="heads")
        if config.output_gate:
            self.gate = projection(dim, inner, ("embed", "heads"), rngs=rngs)
        self.out = projection(inner, dim, ("heads", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def init_state(self, batch_size: int) -> MatrixMemoryState:
        """The state every row and every segment starts from: zero matrices."""
        c = self.config
        return MatrixMemoryState(
            memory=tuple(jnp.zeros((batch_size, m.heads, m.key, m.value), self.wide_dtype()) for m in c.matrices),
            tail=jnp.zeros((batch_size, c.conv_width - 1, sum(c.widths)), self.qkv.kernel.dtype),
            place=jnp.zeros((batch_size,), jnp.int32) if self.counts_tokens else None,
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: MatrixMemoryState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        without: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], MatrixMemoryState]:
        """Writes and reads every token; a new segment starts from zero. Padding (-1) gives 0; `without` names the
        memory reads to remove, in a subclass with several."""
        read, state, _ = self._mix(x_BTD, state, segment_ids, without)
        y = self.project_read(x_BTD, read)
        return y if segment_ids is None else mask_tokens(segment_ids >= 0, y), state

    def report(
        self, x_BTD: Float[Array, "B T D"], state: MatrixMemoryState | None = None, segment_ids=None
    ) -> dict[str, Array]:
        """Diagnostics of one call: norm of the matrices after it, means of the gates and how often they saturate."""
        _, after, terms = self._mix(x_BTD, state, segment_ids)
        return self.report_of(after.memory, terms)

    def report_of(self, memory: tuple[Array, ...], terms: dict[str, Any], real=None) -> dict[str, Array]:
        """The report of a call that left `memory`; real [B, T]: the tokens whose gates count, None = all."""
        size = sum(jnp.mean(jnp.sum(m * m, axis=(-2, -1))) for _, m in zip(self.config.matrices, memory))
        found = {"memory_norm": jnp.sqrt(size)}
        gates = {"decay": jnp.exp(terms["g"])} if terms.get("g") is not None else {}
        gates |= {"beta": terms["beta"]} if "beta" in terms else {}
        for name, gate in gates.items():
            where = None if real is None else real.reshape(real.shape + (1,) * (gate.ndim - 2))
            found[f"{name}_mean"] = jnp.mean(gate, where=where)
            found[f"{name}_saturated"] = jnp.mean((gate < 0.01) | (gate > 0.99), where=where)
        return found

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT) -> tuple[Array, Array, Array, dict[str, Any]]:
        """The operation's inputs: (q, k, v, further arguments: g, beta, scale)."""
        logits = {name: project(x_BTD) for name, project in self.gate_projections().items()}
        return *self.features(q_BTHK, k_BTHK, v_BTHV), self.gates(logits)

    def features(self, q_BTHK, k_BTHK, v_BTHV) -> tuple[Array, Array, Array]:
        """The map of queries, keys and values before the operation."""
        raise NotImplementedError(f"{type(self).__name__} must define features(q, k, v), or tokens(x, q, k, v, place).")

    def gate_projections(self) -> dict[str, nnx.Module]:
        """The projections for the gates, by name."""
        return {}

    def gates(self, logits: dict[str, Array]) -> dict[str, Any]:
        """The gates (g, beta) from the outputs of `gate_projections`."""
        return {}

    def apply_operation(self, q, k, v, terms, state: Any, segment_ids) -> tuple[Array, tuple[Array, ...]]:
        """The passes of the operation on `state.memory`: (reads [B, T, HV, V], the memory after the last token)."""
        out, memory = self.apply_once(q, k, v, terms, state.memory[0], segment_ids)
        return out, (memory,)

    def apply_once(self, q, k, v, terms, memory, segment_ids) -> tuple[Array, Array]:
        """One pass of the operation: (reads [B, T, HV, V], the matrices after the last token)."""
        c = self.config
        op, _, transition = OPERATIONS[c.operation]
        settings = dict(chunk_size=c.chunk_size, implementation=c.implementation)
        if not sequence.is_split():
            return op(q, k, v, initial_state=memory, segment_ids=segment_ids, **terms, **settings)
        gates = {name: terms[name] for name in ("g", "beta") if name in terms}
        settings |= {name: value for name, value in terms.items() if name not in gates}
        inputs = dict(q=q, k=k, v=v) | gates
        return split_operation(op, transition, inputs, memory, segment_ids, **settings)

    def project_read(self, x_BTD, read_BTHV) -> Float[Array, "B T D"]:
        """W_o (norm(read) * act(x W_gate)), each part where the mixer has it."""
        flat = (*read_BTHV.shape[:2], -1)
        y = read_BTHV.reshape(flat) if self.norm_width == "all" else read_BTHV
        y = (y if self.norm_width == "none" else self.norm(y)).reshape(flat)
        if self.config.output_gate:
            y = y * self.gate_activation(self.gate(x_BTD))
        return self.out(y)

    def wide_dtype(self):
        """The dtype of gates and memory: float32, or float64 if the parameters are."""
        return jnp.promote_types(self.out.kernel.dtype, jnp.float32)

    def short_activation(self, x: Array) -> Array:
        """SiLU after a convolution, as in published models; else the identity."""
        return jax.nn.silu(x) if self.config.conv_width > 1 else x

    def _mix(self, x_BTD, state: MatrixMemoryState | None, segment_ids, without: tuple[str, ...] = ()):
        """Returns the reads [B, T, HV, V], the new state and the terms of the operation."""
        B, T, _ = x_BTD.shape
        state = self.init_state(B) if state is None else state
        if segment_ids is None:
            last = jnp.maximum(state.last_segment, 0)
        else:
            last = last_segment_after(state.last_segment, segment_ids)
            anew = starts_anew(state.last_segment, segment_ids)
            state = select_rows(anew, self.init_state(B), state)
        q, k, v, tail = self._project(x_BTD, state.tail, segment_ids)
        place_BT, place = None, None
        if self.counts_tokens:
            place_BT, place = positions_in_segment(state.place, state.last_segment, segment_ids, T)
        q, k, v, terms = self.tokens(x_BTD, q, k, v, place_BT)
        terms = terms | {"without": without} if without else terms
        read, memory = self.apply_operation(q, k, v, terms, state, segment_ids)
        if segment_ids is not None:
            read = jnp.where((segment_ids >= 0)[..., None, None], read, 0)
        return read, MatrixMemoryState(memory, tail, place, last), terms

    def _project(self, x_BTD, tail, segment_ids):
        """Returns q and k [B, T, H, K], v [B, T, HV, V], convolved where the config says so, and the new tail."""
        c = self.config
        mixed = self.qkv(x_BTD)
        if c.conv_width > 1:
            mixed, tail = self.conv(mixed, tail, segment_ids)
        parts = jnp.split(mixed, [c.widths[0], c.widths[0] + c.widths[1]], axis=-1)
        heads = (c.heads, c.heads, c.values[0])
        return *(y.reshape(*x_BTD.shape[:2], h, -1) for y, h in zip(parts, heads)), tail


def positions_in_segment(
    seen: Int[Array, " B"], last_segment: Int[Array, " B"], segment_ids: Int[Array, "B T"] | None, length: int
) -> tuple[Int[Array, "B T"], Int[Array, " B"]]:
    """Each token's position in its segment, from 0, and the number of tokens in the row's last segment after the call.

    seen: tokens of the segment `last_segment` before the call. Padding is not counted; its position is -1.
    """
    if sequence.is_split():
        return _positions_in_piece(seen, last_segment, segment_ids, length)
    if segment_ids is None:
        return seen[:, None] + jnp.arange(length), seen + length
    real = segment_ids >= 0
    before = jnp.concatenate([last_segment[:, None], segment_ids[:, :-1]], axis=1)
    begins = real & (segment_ids != jax.lax.cummax(before, axis=1))
    count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
    outside = jax.lax.cummax(jnp.where(begins, count - 1, -seen[:, None]), axis=1)  # counted, but of other segments
    return jnp.where(real, count - 1 - outside, -1), count[:, -1] - outside[:, -1]


def _positions_in_piece(seen, last_segment, segment_ids, length):
    """`positions_in_segment` of rows split over devices."""
    if segment_ids is None:
        here = seen + sequence.index() * length
        return here[:, None] + jnp.arange(length), seen + sequence.count() * length
    with sequence.pieces(None):
        _, tokens = positions_in_segment(jnp.zeros_like(seen), jnp.full_like(seen, -1), segment_ids, length)
    last = jnp.max(segment_ids, axis=1)
    seen, last_segment, after = sequence.segment_before(seen, last_segment, tokens, last)
    with sequence.pieces(None):
        return positions_in_segment(seen, last_segment, segment_ids, length)[0], after
