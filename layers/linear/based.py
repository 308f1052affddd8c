"""Based's linear attention: the exponential's second-order Taylor series as score (arXiv 2402.18668).

    phi(q) . phi(k) = 1 + s + s^2 / 2,  s = q . k / sqrt(d)
    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  o_t = phi(q_t) S_t / (phi(q_t) . z_t)

phi(x) holds 1, the d entries of x and the d (d + 1) / 2 different products of two of them, which give the same scores
as all d^2. In the paper layers of this alternate with layers of sliding-window attention, `attention` with `window`
set: the two sizes, `head_dim` here and `window` there, trade memory for recall.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.layers.common.matrix_memory import Matrix, MatrixMemory, MatrixMemoryConfig
from engrax.layers.linear.linear_attention import normalised_operation
from engrax.layers.mixer import MIXERS


@MIXERS.register("based")
@dataclasses.dataclass(frozen=True)
class BasedConfig(MatrixMemoryConfig):
    """Settings of Based's linear attention; head_dim is the paper's feature dimension d."""

    head_dim: int = 16  # key width d of a head before the feature map to 1 + d + d (d + 1) / 2 features
    value_dim: int | None = 32  # value width of a head; None = head_dim

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Based":
        return Based(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["BasedConfig", ...]:
        small = cls(heads=2, value_heads=4, head_dim=3, value_dim=6, chunk_size=8, conv_width=4, output_gate=True)
        return small, cls()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        heads, value = self.values
        features = 1 + self.head_dim + self.head_dim * (self.head_dim + 1) // 2
        return (Matrix(self.heads, heads, features, value + 1),)


def products(x):
    """The d (d + 1) / 2 products of two entries of the last axis, so weighted that products(q) . products(k) =
    (q . k)^2."""
    i, j = np.tril_indices(x.shape[-1])
    weight = jnp.asarray(np.where(i == j, 1.0, 2**0.5), x.dtype)
    return x[..., i] * x[..., j] * weight


def taylor_features(x):
    """phi with phi(q) . phi(k) = 1 + s + s^2 / 2, s = q . k / sqrt(d)."""
    x = x * x.shape[-1] ** -0.25
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x, products(x) * 0.5**0.5], axis=-1)


class Based(MatrixMemory):
    """The module of BasedConfig."""

    norm_width = "none"

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v = (self.short_activation(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        return taylor_features(q), taylor_features(k), v, {}

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        return normalised_operation(super().apply_operation, q, k, v, terms, state, segment_ids)
