"""Memorizing Transformer attention (arXiv 2203.08913): Transformer-XL's, and k nearest neighbours among older keys.

Keys and values of every complete segment go, without gradient, into a ring buffer of M tokens of the row. A token's
query finds its k nearest among the keys of its document, by cosine, for each head apart:

    m_i = softmax_{j in top-k}(s cos(q_i, k_j)) v_j,   y_i = W_o [g m_i + (1 - g) local_i],   g = sigmoid(b)

with s and b learned for each head. If the buffer has no tokens of the document yet, y is the local attention.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError
from engrax.layers.attention.transformer_xl import Inputs, TransformerXL, TransformerXLConfig
from engrax.layers.common.modules import l2_normalise
from engrax.layers.common.segments import select_rows
from engrax.layers.mixer import MIXERS


class Bank(NamedTuple):
    """The ring buffer."""

    keys: Float[Array, "B M H K"]  # of length 1
    values: Float[Array, "B M H K"]
    ids: Int[Array, "B M"]  # segment id of each token, -1 = empty or padding
    next: Int[Array, " B"]  # slot of the next segment's first token


@MIXERS.register("memorizing")
@dataclasses.dataclass(frozen=True)
class MemorizingConfig(TransformerXLConfig):
    """Settings of Memorizing Transformer attention."""

    memory_reads: ClassVar[tuple[str, ...]] = ("segment_before", "neighbours")

    bank_size: int = 1024  # M, tokens in the ring buffer, a multiple of the segment length
    neighbours: int = 16  # k, tokens that a query reads from it

    exempt_from = {"trainability.finite_differences": "stop-gradient memory, and top-k neighbours may tie"}

    def __post_init__(self):
        super().__post_init__()
        if self.bank_size < 1 or self.bank_size % self.segment_length:
            raise UserError(
                f"bank_size={self.bank_size} is not a multiple of segment_length={self.segment_length}; choose one."
            )
        if not 1 <= self.neighbours <= self.bank_size:
            raise UserError(f"neighbours={self.neighbours} must lie between 1 and bank_size={self.bank_size}.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Memorizing":
        return Memorizing(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["MemorizingConfig", ...]:
        return (cls(heads=2, head_dim=4, segment_length=4, bank_size=12, neighbours=3),)

    def scaled(self, factor: float) -> "MemorizingConfig":
        """With longer segments, and as many of them in the ring buffer."""
        length = max(2, round(self.segment_length * factor))
        return dataclasses.replace(
            self, segment_length=length, bank_size=self.bank_size // self.segment_length * length
        )

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        inner = self.heads * self.head_dim
        return super().flops_per_token(dim, seq_len) + 2 * inner * (self.bank_size + self.neighbours)


class Memorizing(TransformerXL):
    """The module of MemorizingConfig."""

    def __init__(self, config: MemorizingConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.recall_scale = nnx.Param(jnp.full(config.heads, config.head_dim**0.5), axes=("heads",), role="gate")
        self.gate_bias = nnx.Param(jnp.zeros(config.heads), axes=("heads",), role="gate")

    def init_recall(self, batch_size: int) -> Bank:
        c = self.config
        empty = jnp.zeros((batch_size, c.bank_size, c.heads, c.head_dim), self.q.kernel.dtype)
        none = jnp.zeros((batch_size,), jnp.int32)
        return Bank(empty, empty, jnp.full((batch_size, c.bank_size), -1, jnp.int32), none)

    def recall(self, memory: Bank, begins: Bool[Array, " B"], before: Inputs, q, k, v, ids, local):
        memory = select_rows(begins, self._stored(memory, before.ids, k, v), memory)
        wide = local.dtype
        scores = jnp.einsum("BSHK,BMHK->BSHM", l2_normalise(q).astype(wide), memory.keys.astype(wide))
        same = (memory.ids[:, None] == ids[..., None]) & (ids >= 0)[..., None]
        scores, nearest = jax.lax.top_k(jnp.where(same[:, :, None], scores, -jnp.inf), self.config.neighbours)
        found = jnp.isfinite(scores)
        some = jnp.any(found, axis=-1, keepdims=True)
        scaled = jnp.where(found, self.recall_scale[...].astype(wide)[:, None] * jnp.where(found, scores, 0), -jnp.inf)
        weights = jax.nn.softmax(jnp.where(some, scaled, 0), axis=-1)
        taken = jnp.take_along_axis(
            jnp.moveaxis(memory.values, 2, 1)[:, None],  # [B, 1, H, M, K]
            nearest[..., None],
            axis=3,
        )
        read = jnp.einsum("BSHN,BSHNK->BSHK", weights, taken.astype(wide))
        gate = jax.nn.sigmoid(self.gate_bias[...].astype(wide))[:, None]
        return memory, jnp.where(some, gate * read + (1 - gate) * local, local)

    def _stored(self, memory: Bank, ids: Int[Array, "B C"], k, v) -> Bank:
        """The buffer, with its oldest segment replaced by the given one."""
        put = jax.vmap(lambda old, new, at: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), at, axis=0))
        k, v = jax.lax.stop_gradient((l2_normalise(k), v))
        at = memory.next
        return Bank(
            keys=put(memory.keys, k, at),
            values=put(memory.values, v, at),
            ids=put(memory.ids, ids, at),
            next=(at + ids.shape[1]) % self.config.bank_size,
        )

    def report(self, x_BTD, state=None, segment_ids=None) -> dict[str, Array]:
        """The gate: the fraction of a head's output that comes from its neighbours."""
        return {"gate": jax.nn.sigmoid(self.gate_bias[...])}
