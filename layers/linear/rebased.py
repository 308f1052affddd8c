"""ReBased: squared scores of normalised queries and keys with a learned scale and shift (arXiv 2402.10644).

    phi(q) . phi(k) = (q' . k')^2,  q' = gamma_q * layernorm(q) + shift_q,  k' alike
    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  o_t = phi(q_t) S_t / (phi(q_t) . z_t)

Based without the constant and the linear term: the score can become 0. phi holds the d (d + 1) / 2 different products
of two entries.
"""

import dataclasses
from typing import Any

from flax import nnx

from engrax.errors import UserError
from engrax.layers.common.matrix_memory import Matrix, MatrixMemory, MatrixMemoryConfig
from engrax.layers.common.modules import layer_norm
from engrax.layers.linear.based import products
from engrax.layers.linear.linear_attention import normalised_operation
from engrax.layers.mixer import MIXERS


@MIXERS.register("rebased")
@dataclasses.dataclass(frozen=True)
class ReBasedConfig(MatrixMemoryConfig):
    """Settings of ReBased; head_dim is the width before the feature map."""

    head_dim: int = 16  # key width d of a head before the feature map to d (d + 1) / 2 features
    value_dim: int | None = 32  # value width of a head; None = head_dim

    def __post_init__(self):
        super().__post_init__()
        if self.head_dim < 2:
            raise UserError(f"head_dim={self.head_dim} must be at least 2: layer norm leaves nothing of one channel.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "ReBased":
        return ReBased(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["ReBasedConfig", ...]:
        small = cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, conv_width=4, output_gate=True)
        return small, cls()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        heads, value = self.values
        return (Matrix(self.heads, heads, self.head_dim * (self.head_dim + 1) // 2, value + 1),)


class ReBased(MatrixMemory):
    """The module of ReBasedConfig."""

    norm_width = "none"

    def __init__(self, config: ReBasedConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.q_norm, self.k_norm = (layer_norm(config.head_dim, rngs=rngs, eps=1e-6) for _ in range(2))

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v = (self.short_activation(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        scale = self.config.head_dim**-0.5
        return products(self.q_norm(q) * scale), products(self.k_norm(k)), v, {}

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        return normalised_operation(super().apply_operation, q, k, v, terms, state, segment_ids)
