"""Infini-attention (arXiv 2404.07143): softmax inside blocks of N tokens, a compressed memory of all earlier ones.

    A_mem,t = phi(q_t) M_{b-1} / (phi(q_t) . z_{b-1}),  A_dot,t = softmax(q_t . k_j / sqrt(K)) v_j, j <= t in block b
    M_b = M_{b-1} + sum_{j in b} phi(k_j) v_j^T,  z_b = z_{b-1} + sum_{j in b} phi(k_j),  phi = elu + 1
    y_t = W_o (sigmoid(beta) A_mem,t + (1 - sigmoid(beta)) A_dot,t)

with one beta per head. Queries and keys of the softmax are rotated by their positions in the block, those of the memory
are not. Blocks are counted from the start of a segment. Tokens of an incomplete block are cached.

The memory is linear attention in which a block is first read and then written: every token is twice in the row, first
at a position that reads and, after the last reader of its block, at a position that writes.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int

from engrax.errors import UserError, require_positive
from engrax.layers.attention.attention import masked_attention
from engrax.layers.attention.rope import rotate
from engrax.layers.common.matrix_memory import Matrix, MatrixMemory, MatrixMemoryConfig, MatrixMemoryState
from engrax.layers.common.segments import first_real_segment
from engrax.layers.linear.linear_attention import FEATURE_MAPS, divided, with_ones
from engrax.layers.mixer import MIXERS


@MIXERS.register("infini_attention")
@dataclasses.dataclass(frozen=True)
class InfiniAttentionConfig(MatrixMemoryConfig):
    """Settings of Infini-attention; a head's values are as wide as its keys."""

    memory_reads: ClassVar[tuple[str, ...]] = ("compressed",)
    state_fields: ClassVar[tuple[str, ...]] = ("head_dim", "block")
    composes: ClassVar[bool] = False  # a block of its softmax may lie in two pieces

    block: int = 32  # tokens that attend to each other, the paper's segment length N
    rope_base: float = 10_000.0  # longest rotary wavelength / 2 pi, in tokens

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "rope_base")
        self.at_least_one("block")
        if self.values != (self.heads, self.head_dim):
            raise UserError(
                "Infini-attention shares heads and widths with its softmax: leave value_heads, value_dim out."
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary positions need pairs of channels.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "InfiniAttention":
        return InfiniAttention(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["InfiniAttentionConfig", ...]:
        return cls(heads=2, head_dim=4, chunk_size=8, conv_width=4, output_gate=True, block=5), cls()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return (Matrix(self.heads, self.heads, self.head_dim, self.head_dim + 1),)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        (m,) = self.matrices  # every token occurs twice in the memory's rows
        once = self.operation_flops(
            batch=1, seq=seq_len, heads=m.heads, key=m.key, value=m.value, chunk_size=self.chunk_size
        )
        local = 4 * self.heads * self.head_dim * (min(self.block, seq_len) + 1) / 2
        return super().flops_per_token(dim, seq_len) + once / seq_len + local


class InfiniAttention(MatrixMemory):
    """The module of InfiniAttentionConfig; its memory holds the matrix, and keys and values of the current block."""

    counts_tokens = True
    norm_width = "none"

    def __init__(self, config: InfiniAttentionConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.gate_bias = nnx.Param(jnp.zeros(config.heads), axes=("heads",), role="gate")

    def init_state(self, batch_size: int) -> MatrixMemoryState:
        state, c = super().init_state(batch_size), self.config
        cache = jnp.zeros((batch_size, c.block, c.heads, c.head_dim), self.qkv.kernel.dtype)
        return state._replace(memory=(*state.memory, cache, cache))

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v = (self.short_activation(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        return q, k, v, {"place": place_BT}

    def call_without(self, reads, x_BTD, state=None, segment_ids=None):
        return self(x_BTD, state, segment_ids, without=reads)

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        N, place = self.config.block, terms["place"]
        matrix, *caches = state.memory
        k, v = (jnp.concatenate([old.astype(y.dtype), y], axis=1) for old, y in zip(caches, (k, v)))
        segment, places = _with_cache(state.place, place, segment_ids, N)
        real, block = places >= 0, places // N
        local = self._softmax(q, k, v, place, segment, places)
        last = jnp.max(jnp.where(segment == jnp.max(segment, axis=1, keepdims=True), places, -1), axis=1) + 1
        is_last = real & (segment == jnp.max(segment, axis=1, keepdims=True))
        kept = is_last & (block == last[:, None] // N)
        recalled, matrix = self._recall(q, k, v, matrix, jnp.where(real, segment, -1), block, kept)
        slot = jnp.where(kept, places % N, N)  # N: dropped
        fill = jax.vmap(lambda cache, y, at: jnp.zeros_like(cache).at[at].set(y.astype(cache.dtype), mode="drop"))
        memory = (matrix, *(fill(old, y, slot) for old, y in zip(caches, (k, v))))
        recalled = jnp.zeros_like(recalled) if "compressed" in terms.get("without", ()) else recalled
        gate_H1 = jax.nn.sigmoid(self.gate_bias[...].astype(self.wide_dtype()))[:, None]
        return (gate_H1 * recalled + (1 - gate_H1) * local).astype(v.dtype), memory

    def _softmax(self, q, k, v, place, segment, places):
        """A_dot [B, T, H, K]: causal attention among the tokens of a block."""
        N, T = self.config.block, q.shape[1]
        index = jnp.arange(N + T)
        same = (segment[:, None] == segment[:, N:, None]) & (places[:, None] // N == place[:, :, None] // N)
        visible = same & (places[:, None] >= 0) & (index <= index[N:, None])
        visible |= index == index[N:, None]  # padding sees itself: no empty softmax
        q, k = (rotate(y, at % N, self.config.rope_base) for y, at in ((q, place), (k, places)))
        return masked_attention(q, k, v, visible)

    def _recall(self, q, k, v, matrix, segment: Int[Array, "B E"], block: Int[Array, "B E"], kept: Bool[Array, "B E"]):
        """A_mem [B, T, H, K] and the matrix after the last complete block."""
        T, E = q.shape[1], k.shape[1]
        phi = FEATURE_MAPS["elu+1"]
        key = jnp.where(kept[..., None, None], 0, phi(k))
        query = jnp.concatenate([jnp.zeros_like(key[:, : E - T]), phi(q)], axis=1)
        reads, writes = _read_then_write(segment, block)

        def spread(y, at):
            return jax.vmap(lambda y, at: jnp.zeros((2 * E, *y.shape[1:]), y.dtype).at[at].set(y))(y, at)

        ids = spread(segment, reads) + spread(segment, writes)  # each is 0 where the other is set
        rows = (spread(query, reads), spread(key, writes), spread(with_ones(v), writes))
        read, matrix = self.apply_once(*rows, {"scale": 1.0}, matrix, ids)
        at = reads[:, E - T :, None, None]
        return divided(jnp.take_along_axis(read, at, axis=1)), matrix


def _with_cache(seen, place, segment_ids, block: int) -> tuple[Int[Array, "B E"], Int[Array, "B E"]]:
    """Segment id and place in the segment, -1 where there is no token, of what is cached and then of the new tokens."""
    slot = jnp.arange(block)
    begin = (seen // block * block)[:, None]
    cached = jnp.where(slot < seen[:, None] - begin, begin + slot, -1)
    ids = jnp.zeros_like(place) if segment_ids is None else segment_ids
    first = first_real_segment(ids)[:, None]
    return jnp.concatenate([jnp.broadcast_to(first, cached.shape), ids], axis=1), jnp.concatenate(
        [cached, place], axis=1
    )


def _read_then_write(
    segment: Int[Array, "B E"], block: Int[Array, "B E"]
) -> tuple[Int[Array, "B E"], Int[Array, "B E"]]:
    """Two places in a row of 2 E for each token: the reads of a block [a, b) at 2 a ... a + b, its writes up to 2 b."""
    E = segment.shape[1]
    real, index = segment >= 0, jnp.arange(E)

    def before(y):  # that of the last token before each; ids and, in a segment, blocks do not decrease
        return jnp.pad(y[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    newest = jax.lax.cummax(jnp.where(real, index, 0), axis=1)
    of_newest = jnp.take_along_axis(segment, newest, axis=1), jnp.take_along_axis(block, newest, axis=1)
    begins = real & ((before(of_newest[0]) != segment) | (before(of_newest[1]) != block))
    start = jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
    following = jax.lax.cummin(jnp.where(begins, index, E), axis=1, reverse=True)
    end = jnp.pad(following[:, 1:], ((0, 0), (0, 1)), constant_values=E)
    return index + start, index + end
