"""The infinite schedule of continual pre-training (arXiv 2403.08763, 2503.02844).

After the warmup the rate falls on half a cosine from the peak to a constant, where it stays while corpora come and go.
Only a model that is to be used is annealed, exponentially, in the last steps:

    rate(t) = constant (final / constant)^((t - A) / (steps - A)),  A = steps - anneal_steps
"""

import dataclasses

import jax.numpy as jnp
import optax

from engrax.errors import UserError, require_at_least
from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("infinite")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InfiniteConfig(ScheduleConfig):
    """Warmup, a cosine cooldown to a constant, and at the end, where asked for, an exponential annealing.

    Without annealing a run may continue for any number of steps; it may be annealed at any later time.
    """

    cooldown_steps: int = 300  # steps from the peak to the constant
    constant_fraction: float = 0.5  # constant learning rate / peak
    anneal_steps: int = 0  # steps of the annealing, which ends at the last step; 0 = none
    final_fraction: float = 0.05  # last learning rate of the annealing / peak

    def __post_init__(self):
        super().__post_init__()
        require_at_least("optimizer.schedule", self, cooldown_steps=0, anneal_steps=0)
        if not 0 < self.final_fraction <= self.constant_fraction <= 1:
            raise UserError(
                f"optimizer.schedule.final_fraction={self.final_fraction} must be above 0 and at most "
                f"constant_fraction={self.constant_fraction}, which must be at most 1."
            )

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        constant = optax.constant_schedule(peak * self.constant_fraction)
        cooldown = constant
        if self.cooldown_steps:
            cooldown = optax.cosine_decay_schedule(peak, self.cooldown_steps, alpha=self.constant_fraction)
        if not self.anneal_steps:
            return cooldown
        begin = max(steps - self.anneal_steps - warmup, 0)  # counted from the end of the warmup
        length = max(steps - warmup - begin, 1)
        fall = self.final_fraction / self.constant_fraction
        # Times 1 before it begins, so a run may be annealed later. It falls from wherever the cooldown is by then.
        return lambda step: cooldown(step) * fall ** jnp.clip((step - begin) / length, 0, 1)
