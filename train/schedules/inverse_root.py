"""Decay with the inverse square root of the step (arXiv 1706.03762, equation 3).

rate(t) = peak sqrt((warmup + 1) / (t + 1)),  t from 0
"""

import dataclasses

import jax.numpy as jnp
import optax

from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("inverse_root")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InverseRootConfig(ScheduleConfig):
    """Warmup, then the peak over the root of the step; a run may continue for any number of steps."""

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        return lambda step: peak * jnp.sqrt((warmup + 1) / (step + warmup + 1))
