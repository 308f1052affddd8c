"""Schedule-free AdamW (arXiv 2405.15682): steps of z, gradients at y, evaluation at the average x; no rate decays.

    y = (1 - b1) z + b1 x        z <- z - rate (g(y) / (sqrt(v) + eps) + weight_decay y)        x <- (1 - c) x + c z

with c the square of the largest rate so far over the sum of these squares. y is what is trained and saved; x follows
from y and z, and is what `engrax evaluate`, `generate` and `export` use, validation during training too. The state is
z and v: 8 bytes per parameter, as AdamW's.
"""

import dataclasses
from typing import Any

import jax
import optax
from optax.contrib import ScheduleFreeState, schedule_free

from engrax.errors import UserError, require_at_least
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.schedules import ConstantConfig, ScheduleConfig


@OPTIMIZERS.register("schedule_free")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleFreeConfig(OptimizerConfig):
    """Schedule-free AdamW: an average of the iterates instead of a decaying learning rate."""

    averages = True

    schedule: ScheduleConfig = ConstantConfig()  # warmup; a decay is neither needed nor meant
    b1: float = 0.9  # weight of the average in the point where gradients are taken
    b2: float = 0.95  # decay of the gradient's square
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("b1", "b2")
        require_at_least("optimizer", self, eps=0)
        if self.b1 == 0:
            raise UserError("optimizer.b1=0 makes no average; give one above 0 and below 1.")

    def direction(self) -> optax.GradientTransformation:
        return optax.scale_by_rms(decay=self.b2, eps=self.eps, eps_in_sqrt=False, bias_correction=True)

    def transformation(self, steps: int, decayed: Any, factors: Any) -> optax.GradientTransformation:
        inner, rate = super().transformation(steps, decayed, factors), self.rate(steps)
        # optax counts the steps of the average from 1, those of the inner rule from 0.
        free = schedule_free(inner, lambda step: rate(step - 1), b1=self.b1)
        return optax.GradientTransformation(free.init, free.update)

    def evaluated(self, params: Any, opt_state: Any) -> Any:
        """x of y and z; frozen parameters as they are."""
        states = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, ScheduleFreeState))
        (state,) = (s for s in states if isinstance(s, ScheduleFreeState))

        def average(z, y):
            return y if isinstance(z, optax.MaskedNode) else (y - (1 - self.b1) * z) / self.b1

        return jax.tree.map(average, state.z, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
