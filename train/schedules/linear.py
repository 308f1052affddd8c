"""Linear decay (arXiv 2502.15938 decays to zero).

rate(t) = peak (1 - (1 - final_fraction) (t - warmup) / (steps - warmup))
"""

import dataclasses

import optax

from engrax.errors import require_at_least
from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("linear")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearConfig(ScheduleConfig):
    """Warmup, then a line from the peak to `final_fraction` of it at the last step."""

    final_fraction: float = 0.0  # last learning rate / peak

    def __post_init__(self):
        super().__post_init__()
        require_at_least("optimizer.schedule", self, final_fraction=0)

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        return optax.linear_schedule(peak, peak * self.final_fraction, max(steps - warmup, 1))
