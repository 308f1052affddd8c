"""A constant learning rate."""

import dataclasses

import optax

from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("constant")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConstantConfig(ScheduleConfig):
    """Warmup, then the peak; a run may continue for any number of steps."""

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        return optax.constant_schedule(peak)
