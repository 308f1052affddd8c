"""AdamW (arXiv 1711.05101): m / (sqrt(v) + eps) of the bias-corrected moments m of the gradient and v of its square."""

import dataclasses

import jax.numpy as jnp
import optax

from engrax.errors import require_at_least
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig


@OPTIMIZERS.register("adamw")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW: the gradient's mean over the root of its mean square."""

    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.95  # decay of the gradient's square
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("b1", "b2")
        require_at_least("optimizer", self, eps=0)

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps, mu_dtype=jnp.float32)
