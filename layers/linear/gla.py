"""Gated linear attention, GLA (arXiv 2312.06635).

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = q_t S_t / sqrt(K),  alpha_t = sigmoid(x_t W_1 W_2 + b)^(1/16)
    y_t = W_o (norm(o_t) * silu(x_t W_gate))

The projection of the gate is low-rank; the root keeps alpha near 1 at the start, so forgetting is slow.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.errors import UserError
from engrax.layers.common.gates import LowRank
from engrax.layers.common.matrix_memory import MatrixMemory, MatrixMemoryConfig
from engrax.layers.mixer import MIXERS


@MIXERS.register("gla")
@dataclasses.dataclass(frozen=True)
class GLAConfig(MatrixMemoryConfig):
    """Settings of gated linear attention."""

    value_dim: int | None = 64  # value width of a head, twice the key's as published; None = head_dim
    output_gate: bool = True  # whether the read is gated by a projection of the input
    gate_rank: int = 16  # channels between the two projections of the forget gate
    gate_temperature: float = 16.0  # divides the log of the forget gate; more = slower forgetting

    routable: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.at_least_one("gate_rank")
        if self.gate_temperature <= 0:
            raise UserError(f"gate_temperature={self.gate_temperature} must be positive.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "GLA":
        return GLA(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["GLAConfig", ...]:
        small = cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, conv_width=4, gate_rank=3)
        return small, cls()

    def gate_multiplies(self, dim: int) -> int:
        return self.gate_rank * (dim + self.values[0] * self.head_dim)


class GLA(MatrixMemory):
    """The module of GLAConfig."""

    def __init__(self, config: GLAConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        shape = (config.values[0], config.head_dim)
        self.forget = LowRank(dim, config.gate_rank, shape[0] * shape[1], rngs=rngs, wide=True)
        self.forget_bias = nnx.Param(jnp.zeros(shape), axes=("heads", "gate"), role="gate")

    def features(self, q_BTHK, k_BTHK, v_BTHV):
        return tuple(self.short_activation(y) for y in (q_BTHK, k_BTHK, v_BTHV))

    def gate_projections(self):
        return {"g": self.forget}

    def gates(self, logits):
        bias_HK, g = self.forget_bias[...].astype(self.wide_dtype()), logits["g"]
        g = g.astype(bias_HK.dtype).reshape(*g.shape[:2], *bias_HK.shape) + bias_HK
        return {"g": jax.nn.log_sigmoid(g) / self.config.gate_temperature}
