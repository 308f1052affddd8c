"""Stochastic gradient descent with momentum: m <- momentum m + g, the step is m, or g + momentum m (Nesterov).

Weight decay is decoupled, as in SGDW (arXiv 1711.05101).
"""

import dataclasses

import jax.numpy as jnp
import optax

from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig


@OPTIMIZERS.register("sgd")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SGDConfig(OptimizerConfig):
    """SGD with momentum, optionally Nesterov's; without state at momentum 0."""

    learning_rate: float = 0.1  # peak of the schedule
    weight_decay: float = 0.0  # per step, times the learning rate; on matrices
    momentum: float = 0.9  # decay of the sum of gradients; 0 = none
    nesterov: bool = False  # looks one momentum step ahead

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("momentum")

    def direction(self) -> optax.GradientTransformation:
        if not self.momentum:
            return optax.identity()
        return optax.trace(self.momentum, nesterov=self.nesterov, accumulator_dtype=jnp.float32)
