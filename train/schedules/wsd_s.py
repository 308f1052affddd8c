"""Warmup, stable, decay in one branch: WSD-S (arXiv 2410.05192).

A run is judged at several ends E. Before each the rate decays, and after it the run continues at the peak, from the
decayed parameters. The decay from step S to E is linear in the inverse of the rate:

    1 / rate(t) = (1 - x) / peak + x / (final_fraction peak),  x = (t - S) / (E - S),  S = E - decay_fraction E
"""

import dataclasses

import jax.numpy as jnp
import optax

from engrax.errors import UserError
from engrax.train.schedules.base import SCHEDULES, ScheduleConfig


@SCHEDULES.register("wsd_s")
@dataclasses.dataclass(frozen=True, kw_only=True)
class WSDSConfig(ScheduleConfig):
    """Warmup, then the peak with a decay before every end; the last step is an end too.

    To continue after the last step, add it to `ends` and give more steps.
    """

    ends: tuple[int, ...] = ()  # steps before the last at which a decay ends, ascending
    decay_fraction: float = 0.1  # fraction of the steps up to an end that are its decay; it begins after the end before
    final_fraction: float = 0.1  # learning rate at an end / peak

    def __post_init__(self):
        super().__post_init__()
        if list(self.ends) != sorted({end for end in self.ends if end > 0}):
            raise UserError(f"optimizer.schedule.ends={self.ends} must be positive and ascending.")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"optimizer.schedule.{name}={getattr(self, name)} must be above 0 and at most 1.")

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        decays, before = [], warmup
        for end in (*(end for end in self.ends if end < steps), steps):
            decays.append((max(end - round(self.decay_fraction * end), before), end))
            before = max(end, before)

        def rate(step):
            found = peak
            for begin, end in decays:
                x = (step + warmup - begin) / max(end - begin, 1)
                inside = (x >= 0) & ((x < 1) | (end == steps))
                found = jnp.where(inside, peak / (1 + jnp.clip(x, 0, 1) * (1 / self.final_fraction - 1)), found)
            return found

        return rate
