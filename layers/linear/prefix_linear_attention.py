"""Prefix linear attention, JRT-RNN (arXiv 2407.05483): linear attention that reads the whole prefix first.

The first P tokens of every segment, its prefix, have keys k' and values v' of a second projection, which all tokens of
the segment see at once:

    S_t = sum_{j<=t} phi(k_j) v_j^T + sum_{j<P} phi(k'_j) v'_j^T,  z_t = the same sums of phi(k_j) and phi(k'_j)
    o_t = phi(q_t) S_t / (phi(q_t) . z_t)

Inside the prefix this is not causal: a token sees later prefix tokens of the same call. A cut between two calls must
therefore follow the prefix, and a next-token loss is valid after it. phi is that of Based.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from engrax.layers.common.matrix_memory import Matrix
from engrax.layers.common.modules import projection
from engrax.layers.linear.based import Based, BasedConfig, taylor_features
from engrax.layers.linear.linear_attention import divided, with_ones
from engrax.layers.mixer import MIXERS


@MIXERS.register("prefix_linear_attention")
@dataclasses.dataclass(frozen=True)
class PrefixLinearAttentionConfig(BasedConfig):
    """Settings of prefix linear attention; head_dim is the feature dimension d of Based."""

    composes: ClassVar[bool] = False  # a prefix may lie in two pieces

    prefix: int = 16  # tokens at the start of every segment, visible to all its tokens

    exempt_from: ClassVar[dict[str, str]] = {
        "causality": "the prefix is not causal: its tokens see one another",
        "state_carry": "a cut inside the prefix hides the tokens after it; cuts come after the prefix",
    }

    def __post_init__(self):
        super().__post_init__()
        self.at_least_one("prefix")

    def of_heads(self, shares: int) -> None:
        """None: its state holds each head twice, for all tokens and for the prefix."""
        return None

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "PrefixLinearAttention":
        return PrefixLinearAttention(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["PrefixLinearAttentionConfig", ...]:
        small = cls(heads=2, value_heads=4, head_dim=3, value_dim=6, chunk_size=8, conv_width=4, prefix=4)
        return small, cls()

    @property
    def least_call(self) -> int:
        return self.prefix

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        (m,) = super().matrices
        return (Matrix(2 * m.query_heads, 2 * m.heads, m.key, m.value),)  # for all tokens, and for the prefix

    def gate_multiplies(self, dim: int) -> int:
        return dim * sum(self.widths[1:])

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        (m,) = super().matrices  # the third pass, backwards through the row
        sizes = dict(heads=m.heads, query_heads=m.query_heads, key=m.key, value=m.value, chunk_size=self.chunk_size)
        return super().flops_per_token(dim, seq_len) + self.operation_flops(batch=1, seq=seq_len, **sizes) / seq_len


class PrefixLinearAttention(Based):
    """The module of PrefixLinearAttentionConfig."""

    counts_tokens = True

    def __init__(self, config: PrefixLinearAttentionConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.prefix_kv = projection(
            dim, sum(config.widths[1:]), ("embed", "heads"), rngs=rngs, widths=config.widths[1:]
        )

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v, terms = super().tokens(x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT)
        keys, values = jnp.split(self.prefix_kv(x_BTD), [self.config.widths[1]], axis=-1)
        inside = (place_BT >= 0) & (place_BT < self.config.prefix)
        keys = jnp.where(inside[..., None, None], taylor_features(keys.reshape(k_BTHK.shape)), 0)
        return q, k, v, terms | {"prefix": (keys, values.reshape(v.shape))}

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        keys, values = terms["prefix"]
        v, values = with_ones(v), with_ones(values)
        once = {"scale": 1.0}
        both = (jnp.concatenate(pair, axis=2) for pair in ((q, q), (k, keys), (v, values)))
        read, memory = self.apply_once(*both, once, state.memory[0], segment_ids)
        read = sum(jnp.split(read, 2, axis=2))
        # The prefix part after a token equals the backward pass's read minus the token's own part.
        backwards = (jnp.flip(y, axis=1) for y in (q, keys, values))
        after, _ = self.apply_once(*backwards, once, jnp.zeros_like(memory[:, : v.shape[2]]), _reversed(segment_ids))
        own = jnp.repeat(jnp.sum(q * keys, axis=-1, keepdims=True), v.shape[2] // q.shape[2], axis=2) * values
        return divided(read + jnp.flip(after, axis=1) - own), (memory,)


def _reversed(segment_ids):
    """Segment ids of the reversed rows, made non-decreasing again."""
    if segment_ids is None:
        return None
    last = jnp.max(segment_ids, axis=1, keepdims=True)
    return jnp.flip(jnp.where(segment_ids >= 0, last - segment_ids, -1), axis=1)
