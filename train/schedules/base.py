"""The schedule contract: the learning rate by step, and the registry of schedules.

A schedule is one file, here or in a user's folder: a frozen dataclass under `@engrax.register("name")` that defines
the rate after the warmup.
"""

import abc
import dataclasses
from typing import ClassVar

import optax

from engrax.errors import require_at_least
from engrax.registry import Registry

SCHEDULES = Registry("schedule", "engrax.train.schedules")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig(abc.ABC):
    """Base of every schedule: a linear warmup, then the rate that the subclass defines."""

    registry: ClassVar[Registry] = SCHEDULES
    registered_name: ClassVar[str] = ""

    warmup_steps: int = 50  # steps of linear warmup from 0 to the peak

    def __post_init__(self):
        require_at_least("optimizer.schedule", self, warmup_steps=0)

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """The learning rate by step (from 0) for a training of `steps` steps, at most `peak`.

        A pure function of the step, so a resumed run continues it exactly.
        """
        warmup = min(self.warmup_steps, steps)
        # Warmup counts from 1: the rate of step 0 is not zero.
        rising = lambda step: peak * (step + 1) / (warmup + 1)  # noqa: E731
        return optax.join_schedules([rising, self.after_warmup(peak, steps, warmup)], [warmup])

    @abc.abstractmethod
    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        """The learning rate by step after the warmup, which took `warmup` of the `steps` steps."""

    def decay_start(self, steps: int) -> float:
        """The first step whose rate depends on the number of steps; math.inf if no rate does."""
        return self.warmup_steps

    def steps_may_change(self, old_steps: int, new_steps: int, done: int) -> bool:
        """Whether the first `done` steps have the same learning rates under `old_steps` and `new_steps`."""
        if old_steps == new_steps:
            return True
        if min(old_steps, new_steps) < self.warmup_steps:  # the shorter run has a shorter warmup
            return False
        return done <= min(self.decay_start(old_steps), self.decay_start(new_steps))
