"""Transformer-XL attention (arXiv 1901.02860): segments also attend to the previous segment, with relative positions.

The row is cut into segments of L tokens. With x the layer's inputs of segment n, SG(x') those of segment n - 1 without
gradient, and R_d the sinusoids of a distance of d tokens:

    q_i = W_q x_i,   [k; v] = [W_k; W_v] [SG(x') | x]
    a_ij = (q_i + u) . k_j + (q_i + w) . W_r R_{i-j},   y_i = W_o softmax_j(a_ij / sqrt(K)) v_j,   j <= i

u and w are learned, one of each for a head. The cache holds inputs, so W_k and W_v learn from it.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError
from engrax.layers.common.modules import projection
from engrax.layers.common.segment_blocks import BlockIndex, block_index
from engrax.layers.common.segments import last_segment_after, select_rows
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig
from engrax.pallas_kernels.common.segments import row_lengths


class Inputs(NamedTuple):
    """The layer's inputs of one segment, by place."""

    x: Float[Array, "B C D"]
    ids: Int[Array, "B C"]  # segment id of each token, -1 = none yet, or padding


class TransformerXLState(NamedTuple):
    """The state for continuing at any position; its size does not depend on T."""

    before: Inputs  # the previous segment, without gradient
    segment: Inputs  # the current one
    memory: Any  # additional state of a subclass, leaves [B, ...]
    place: Int[Array, " B"]  # tokens of the current segment so far
    last_segment: Int[Array, " B"]


@MIXERS.register("transformer_xl")
@dataclasses.dataclass(frozen=True)
class TransformerXLConfig(MixerConfig):
    """Settings of Transformer-XL attention."""

    memory_reads: ClassVar[tuple[str, ...]] = ("segment_before",)
    state_fields: ClassVar[tuple[str, ...]] = ("segment_length",)

    heads: int = 4  # of the attention
    head_dim: int = 32  # width of one head, even
    segment_length: int = 64  # L, tokens of a segment; the cache holds as many

    exempt_from = {"trainability.finite_differences": "stop-gradient cache of the segment before"}

    def __post_init__(self):
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; sinusoids come in pairs, choose an even width.")
        for name in ("heads", "head_dim", "segment_length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "TransformerXL":
        return TransformerXL(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["TransformerXLConfig", ...]:
        return (cls(heads=2, head_dim=4, segment_length=8),)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        inner, L = self.heads * self.head_dim, self.segment_length
        cached = min(L, max(seq_len - L, 0))  # keys and values of the cache are made again
        distances = 2 * inner * self.head_dim * 2  # W_r of 2 L distances, once a segment
        scores = 2 * inner * (2 * L) + 4 * inner * ((min(L, seq_len) + 1) / 2 + cached)
        return 8 * dim * inner + 4 * dim * inner * (cached > 0) + scores + distances


class TransformerXL(Mixer):
    """The module of TransformerXLConfig: x [B, T, D] -> y [B, T, D], TransformerXLState."""

    def __init__(self, config: TransformerXLConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        inner = config.heads * config.head_dim
        self.q = projection(dim, inner, ("embed", "heads"), rngs=rngs)
        self.kv = projection(dim, 2 * inner, ("embed", "heads"), rngs=rngs, widths=(inner,) * 2)
        self.distance = projection(config.head_dim, inner, ("embed", "heads"), rngs=rngs)
        init = jax.nn.initializers.normal(0.02)
        shape = (config.heads, config.head_dim)
        self.content_bias = nnx.Param(init(rngs.params(), shape), axes=("heads", "norm"), role="bias")
        self.distance_bias = nnx.Param(init(rngs.params(), shape), axes=("heads", "norm"), role="bias")
        self.out = projection(inner, dim, ("heads", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def init_state(self, batch_size: int) -> TransformerXLState:
        """Empty caches, at place 0."""
        L, kernel = self.config.segment_length, self.q.kernel
        nothing = Inputs(
            jnp.zeros((batch_size, L, kernel.shape[0]), kernel.dtype), jnp.full((batch_size, L), -1, jnp.int32)
        )
        return TransformerXLState(
            before=nothing,
            segment=nothing,
            memory=self.init_recall(batch_size),
            place=np.zeros(batch_size, np.int32),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def init_recall(self, batch_size: int) -> Any:
        """The additional state of a subclass."""
        return ()

    def recall(self, memory: Any, begins: Bool[Array, " B"], before: Inputs, q, k, v, ids, local) -> tuple[Any, Array]:
        """The new memory and the replacement of `local`; k, v [B, C, H, K] belong to the previous segment."""
        return memory, local

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: TransformerXLState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        without: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], TransformerXLState]:
        """Attends to the tokens of this and the previous segment. Padding (-1) gives 0; `without`: memory reads to
        remove."""
        B, T, _ = x_BTD.shape
        state = self.init_state(B) if state is None else state
        lengths = None if segment_ids is None else row_lengths(segment_ids)
        if segment_ids is None:
            segment_ids = jnp.broadcast_to(jnp.maximum(state.last_segment, 0)[:, None], (B, T))
        x_BTD = jnp.where((segment_ids >= 0)[..., None], x_BTD, 0)  # padding may hold anything, NaN included
        places = block_index(state.place, T, self.config.segment_length, lengths)
        blocks = (places.blocks, places.to_blocks(x_BTD), places.to_blocks(segment_ids))

        def body(carry, block):
            return self._block(carry, *block, without)

        carry, y = jax.lax.scan(body, (state.before, state.segment, state.memory), blocks)
        before, segment, memory = carry
        place = (jnp.asarray(state.place) + (T if lengths is None else lengths)) % self.config.segment_length
        last = last_segment_after(state.last_segment, segment_ids)
        return places.from_blocks(y), TransformerXLState(before, segment, memory, place.astype(jnp.int32), last)

    def call_without(self, reads, x_BTD, state=None, segment_ids=None):
        return self(x_BTD, state, segment_ids, without=reads)

    def _block(self, carry, places: BlockIndex, x, ids, without: tuple[str, ...] = ()):
        """One segment, or a token of it: returns the carry and the mixed tokens [B, S, D]."""
        before, segment, memory = carry
        begins = places.count * (places.first == 0) > 0
        before = select_rows(begins, jax.lax.stop_gradient(segment), before)
        segment = segment._replace(ids=jnp.where(begins[:, None], -1, segment.ids))
        ids = jnp.where(places.holds, ids, -1)
        segment = places.merge(segment, Inputs(x, ids))
        L, q = before.ids.shape[1], self._heads(self.q(x))
        both = Inputs(*(jnp.concatenate([a, b], axis=1) for a, b in zip(before, segment)))
        k, v = (self._heads(y) for y in jnp.split(self.kv(both.x.astype(x.dtype)), 2, axis=-1))
        distance = places.place[..., None] + L - jnp.arange(2 * L)
        visible = (both.ids[:, None] == ids[..., None]) & (distance >= 0) & (ids >= 0)[..., None]
        if "segment_before" in without:
            visible = visible & (jnp.arange(2 * L) >= L)
        y = self._attend(q, k, v, distance, visible | (distance == 0))  # holes and padding see themselves
        memory, recalled = self.recall(memory, begins, before, q, k[:, :L], v[:, :L], ids, y)
        y = y if "neighbours" in without else recalled
        y = jnp.where((ids >= 0)[..., None, None], y, 0).astype(x.dtype)
        return (before, segment, memory), self.out(y.reshape(*ids.shape, -1))

    def _heads(self, y):
        return y.reshape(*y.shape[:2], self.config.heads, self.config.head_dim)

    def _attend(self, q, k, v, distance: Int[Array, "B S E"], visible: Bool[Array, "B S E"]):
        """Attention [B, S, H, K] over both segments with relative positions."""
        wide = jnp.promote_types(q.dtype, jnp.float32)
        r_EHK = self.distance(sinusoids(visible.shape[-1], self.config.head_dim, q.dtype))
        r_EHK = r_EHK.reshape(-1, *q.shape[2:])
        content = jnp.einsum("BSHK,BEHK->BSHE", (q + self.content_bias[...]).astype(wide), k.astype(wide))
        by_distance = jnp.einsum("BSHK,EHK->BSHE", (q + self.distance_bias[...]).astype(wide), r_EHK.astype(wide))
        at = jnp.maximum(distance, 0)[:, :, None]
        scores = (content + jnp.take_along_axis(by_distance, at, axis=-1)) * q.shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(visible[:, :, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BSHE,BEHK->BSHK", weights, v.astype(wide))


def sinusoids(count: int, width: int, dtype: Any) -> Float[Array, "N K"]:
    """sin and cos of distances 0 ... count - 1, wavelengths 2 pi to 10,000 times that."""
    angle = np.arange(count)[:, None] * 10_000.0 ** -(np.arange(width // 2) / (width // 2))
    return jnp.asarray(np.concatenate([np.sin(angle), np.cos(angle)], axis=1), dtype)
