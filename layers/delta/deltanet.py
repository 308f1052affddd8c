"""DeltaNet (arXiv 2406.06484):

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T,  o_t = q_t S_t / sqrt(K),  beta_t = sigmoid(x_t W_beta)
    y_t = W_o norm(o_t)

with q = silu(conv(x W_q)) / |.|, k alike and v = silu(conv(x W_v)).
"""

import dataclasses
from typing import Any, ClassVar

import jax
from flax import nnx

from engrax.errors import UserError, require_positive
from engrax.layers.common.matrix_memory import MatrixMemory, MatrixMemoryConfig
from engrax.layers.common.modules import l2_normalise, projection
from engrax.layers.mixer import MIXERS


@MIXERS.register("deltanet")
@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(MatrixMemoryConfig):
    """Settings of DeltaNet."""

    conv_width: int = 4  # taps of the short convolution on q, k and v; 1 = none
    l2_eps: float = 1e-12  # added to the squared length of queries and keys, whose root they are divided by
    max_beta: float = 1.0  # upper bound of beta; up to 2 the memory may turn a key's value round (arXiv 2411.12537)

    operation: ClassVar = "delta"
    routable: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        self.check_max_beta()
        require_positive(self, "l2_eps")

    def check_max_beta(self):
        """Raises UserError unless the state stays bounded."""
        if not 0 < self.max_beta <= 2:
            raise UserError(f"max_beta={self.max_beta} must lie in (0, 2]: beyond 2 the memory grows without bound.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "DeltaNet":
        return DeltaNet(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["DeltaNetConfig", ...]:
        small = cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, output_gate=True, max_beta=2.0)
        return small, cls()

    def gate_multiplies(self, dim: int) -> int:
        return dim * self.values[0]


class DeltaNet(MatrixMemory):
    """The module of DeltaNetConfig."""

    def __init__(self, config: DeltaNetConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.beta = projection(dim, config.values[0], ("embed", "heads"), rngs=rngs, wide=True)

    def features(self, q_BTHK, k_BTHK, v_BTHV):
        q, k, v = (jax.nn.silu(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        eps = self.config.l2_eps
        return l2_normalise(q, eps), l2_normalise(k, eps), v

    def gate_projections(self):
        return {"beta": self.beta}

    def gates(self, logits):
        return {"beta": self.config.max_beta * jax.nn.sigmoid(logits["beta"].astype(self.wide_dtype()))}
