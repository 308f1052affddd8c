"""Linear attention with a feature map (arXiv 2006.16236):

    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  o_t = phi(q_t) S_t / (phi(q_t) . z_t)

The normaliser z is an additional column of S, for a value that is always 1. Without it the read is divided by its root
mean square (arXiv 2210.10340), which does not need positive features.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.errors import UserError
from engrax.layers.common.matrix_memory import Matrix, MatrixMemory, MatrixMemoryConfig
from engrax.layers.mixer import MIXERS
from engrax.registry import did_you_mean

FEATURE_MAPS = {
    "elu+1": lambda x: jax.nn.elu(x) + 1,
    "relu": jax.nn.relu,
    "exp": jnp.exp,
    "softmax": lambda x: jax.nn.softmax(x, axis=-1),
    "silu": jax.nn.silu,
    "identity": lambda x: x,
}
SIGNED = ("silu", "identity")  # maps whose features may be negative
EPSILON = 1e-6  # added to the normaliser


@MIXERS.register("linear_attention")
@dataclasses.dataclass(frozen=True)
class LinearAttentionConfig(MatrixMemoryConfig):
    """Settings of linear attention."""

    feature_map: str = "elu+1"  # of queries and keys: elu+1 | relu | exp | softmax | silu | identity
    normalise: bool = True  # True: divided by the sum of the scores; False: RMS norm of each head's read

    routable: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if self.feature_map not in FEATURE_MAPS:
            near = did_you_mean(self.feature_map, FEATURE_MAPS)
            raise UserError(f"unknown feature_map={self.feature_map!r}{near} (known: {', '.join(FEATURE_MAPS)}).")
        if self.normalise and self.feature_map in SIGNED:
            raise UserError(
                f"feature_map={self.feature_map!r} may be negative, so sums of scores may be 0; set normalise=False."
            )

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "LinearAttention":
        return LinearAttention(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["LinearAttentionConfig", ...]:
        small = cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, conv_width=4, output_gate=True)
        return small, dataclasses.replace(small, feature_map="silu", normalise=False), cls()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        heads, value = self.values
        return (Matrix(self.heads, heads, self.head_dim, value + self.normalise),)


class LinearAttention(MatrixMemory):
    """The module of LinearAttentionConfig."""

    def __init__(self, config: LinearAttentionConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.norm_width = "none" if config.normalise else "head"
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)

    def features(self, q_BTHK, k_BTHK, v_BTHV):
        q, k, v = (self.short_activation(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        phi = FEATURE_MAPS[self.config.feature_map]
        return phi(q), phi(k), v

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        if not self.config.normalise:
            return super().apply_operation(q, k, v, terms, state, segment_ids)
        return normalised_operation(super().apply_operation, q, k, v, terms, state, segment_ids)


def normalised_operation(apply_operation, q, k, v, terms, state, segment_ids):
    """Runs a mixer's `apply_operation` so that every read is divided by the sum of its scores."""
    out, memory = apply_operation(q, k, with_ones(v), terms | {"scale": 1.0}, state, segment_ids)
    return divided(out), memory


def with_ones(v_BTHV):
    """Values with an additional column of ones, whose read is the sum of the scores."""
    return jnp.concatenate([v_BTHV, jnp.ones((*v_BTHV.shape[:-1], 1), v_BTHV.dtype)], axis=-1)


def divided(read_BTHV):
    """Reads of `with_ones` divided by their last column."""
    wide = read_BTHV.astype(jnp.promote_types(read_BTHV.dtype, jnp.float32))
    return (wide[..., :-1] / (wide[..., -1:] + EPSILON)).astype(read_BTHV.dtype)
