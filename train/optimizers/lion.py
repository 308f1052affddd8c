"""Lion (arXiv 2302.06675): the sign of an average of the gradient and its running mean.

Every entry moves by the learning rate. Lion therefore needs a rate 3 to 10 times lower than AdamW and a weight decay
higher by the same factor (section 5 of the paper). It has one moment instead of two.
"""

import dataclasses

import jax.numpy as jnp
import optax

from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig


@OPTIMIZERS.register("lion")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LionConfig(OptimizerConfig):
    """Lion: the sign of the averaged gradient; one moment, and a lower learning rate than AdamW's."""

    learning_rate: float = 3e-4  # peak of the schedule
    weight_decay: float = 1.0  # per step, times the learning rate; on matrices
    b1: float = 0.9  # weight of the running mean in the step
    b2: float = 0.99  # decay of the running mean

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("b1", "b2")

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_lion(b1=self.b1, b2=self.b2, mu_dtype=jnp.float32)
