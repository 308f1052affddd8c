"""The schedule contract: the learning rate by step, and the registry of schedules.

A schedule is one file, here or in a user's folder: a frozen dataclass under `@engrax.register("name")` that defines
the rate after the warmup.
"""

import abc
import dataclasses
import re
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from engrax.errors import UserError, require_at_least
from engrax.registry import Registry

SCHEDULES = Registry("schedule", "engrax.train.schedules")
BLOCK = 4096  # steps compared at once


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

        A pure function of the step, so a resumed run continues it exactly. Raises UserError if it is not, or if jit
        cannot compile it.
        """
        warmup = min(self.warmup_steps, steps)
        # Warmup counts from 1: the rate of step 0 is not zero.
        rising = lambda step: peak * (step + 1) / (warmup + 1)  # noqa: E731
        schedule = optax.join_schedules([rising, self.after_warmup(peak, steps, warmup)], [warmup])
        _refuse_impure(schedule, self.registered_name)
        return schedule

    @abc.abstractmethod
    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        """The learning rate by step after the warmup, which took `warmup` of the `steps` steps.

        The step is a traced int32: compute with jax.numpy. Before the warmup ends it is negative, and the rate unused.
        """


def first_difference(old: optax.Schedule, new: optax.Schedule, done: int) -> tuple[int, float, float] | None:
    """(step from 0, old rate, new rate) of the first of `done` steps with another learning rate; None if all agree to
    the bit."""
    for begin in range(0, done, BLOCK):
        steps = begin + jnp.arange(BLOCK, dtype=jnp.int32)
        # Op by op: fused programs may round differently.
        before, after = (np.broadcast_to(jax.vmap(rate)(steps), BLOCK)[: done - begin] for rate in (old, new))
        for at in np.flatnonzero(before != after)[:1]:
            return begin + int(at), float(before[at]), float(after[at])
    return None


def _refuse_impure(schedule: optax.Schedule, name: str) -> None:
    """Raises UserError unless the schedule compiles to a scalar and is traced to the same program twice."""
    step = jax.ShapeDtypeStruct((), jnp.int32)
    try:
        once, again = (jax.make_jaxpr(lambda n: schedule(n))(step) for _ in range(2))  # jax keeps a function's program
    except Exception as error:  # of any type: it is the user's code
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the schedule {name} cannot be compiled ({type(error).__name__}: {reason}); compute the rate from the "
            "step with jax.numpy, without `if` and `float`."
        ) from error
    program, twin = (re.sub("0x[0-9a-f]+", "", str(found)) for found in (once, again))
    if program != twin or not all(map(np.array_equal, once.consts, again.consts)):
        raise UserError(f"the schedule {name} changes each time it is read; compute the rate from the step alone.")
    if [found.shape for found in once.out_avals] != [()]:
        raise UserError(f"the schedule {name} does not return one number; return the learning rate of the step.")
