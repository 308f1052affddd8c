"""Cosine decay (arXiv 1608.03983, without restarts)."""

import dataclasses

import optax

from engrax.errors import require_at_least
from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("cosine")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineConfig(ScheduleConfig):
    """Warmup, then half a cosine from the peak to `final_fraction` of it."""

    final_fraction: float = 0.1  # last learning rate / peak

    def __post_init__(self):
        super().__post_init__()
        require_at_least("optimizer.schedule", self, final_fraction=0)

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=self.final_fraction)
