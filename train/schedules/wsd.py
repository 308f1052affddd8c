"""Warmup, stable, decay (arXiv 2404.06395)."""

import dataclasses

import optax

from engrax.errors import UserError, require_at_least
from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("wsd")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WSDConfig(ScheduleConfig):
    """Warmup, the peak, then a linear decay; until the decay begins, a run may be extended."""

    decay_fraction: float = 0.2  # fraction of all steps in the decay
    final_fraction: float = 0.1  # last learning rate / peak

    def __post_init__(self):
        super().__post_init__()
        require_at_least("optimizer.schedule", self, final_fraction=0)
        if not 0 <= self.decay_fraction <= 1:
            raise UserError(f"optimizer.schedule.decay_fraction={self.decay_fraction} must lie between 0 and 1.")

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        stable = max(steps - round(self.decay_fraction * steps), warmup) - warmup
        decay = optax.linear_schedule(peak, peak * self.final_fraction, max(steps - warmup - stable, 1))
        return optax.join_schedules([optax.constant_schedule(peak), decay], [stable])
