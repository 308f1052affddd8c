"""The schedule contract: the learning rate by step, and the registry that finds a schedule by name.

A schedule is one file here, or the user's own: a frozen dataclass under `@engrax.register("name")` that says what
follows the warmup.
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
    """Base of every schedule: a linear warmup, then what the subclass says."""

    registry: ClassVar[Registry] = SCHEDULES
    registered_name: ClassVar[str] = ""

    warmup_steps: int = 50  # steps of linear warmup from 0 to the peak

    def __post_init__(self):
        require_at_least("optimizer.schedule", self, warmup_steps=0)

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        """The learning rate by step (from 0) of a training of `steps` steps; `peak` is the highest.

        A pure function of the step, so that a resumed run continues it exactly.
        """
        warmup = min(self.warmup_steps, steps)
        # Step 0 already moves: warmup counts from 1.
        rising = lambda step: peak * (step + 1) / (warmup + 1)  # noqa: E731
        return optax.join_schedules([rising, self.after_warmup(peak, steps, warmup)], [warmup])

    @abc.abstractmethod
    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        """The learning rate by step since the end of the warmup, which took `warmup` of the `steps` steps."""

    def decay_start(self, steps: int) -> float:
        """The first step whose rate depends on the number of steps; math.inf where none does."""
        return self.warmup_steps

    def steps_may_change(self, old_steps: int, new_steps: int, done: int) -> bool:
        """Whether `done` steps of a run for `old_steps` had the learning rates that `new_steps` would give them."""
        if old_steps == new_steps:
            return True
        if min(old_steps, new_steps) < self.warmup_steps:  # the shorter run has a shorter warmup
            return False
        return done <= min(self.decay_start(old_steps), self.decay_start(new_steps))
