"""Guards: what becomes of a step whose loss, gradient or memory is not finite, or whose loss or gradient norm spikes.

The verdict on a step falls inside the compiled step, on all devices alike and without a host sync. Of a bad step
nothing is kept: parameters, optimizer state and carried memory stay as they were, bit for bit; step and data position
move on. The host reads the verdict with the metrics, one step late, and skips, rewinds or aborts.

A spike is a value whose logarithm lies `sigma` deviations above its mean. Mean and deviation are those of all sound
steps at first, and exponential over `horizon` steps later:

    mean += a (x - mean),  variance = (1 - a) (variance + a (x - mean)^2),  a = max(1 / n, 1 / horizon)
"""

import dataclasses
import itertools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import Diverged, UserError, require_at_least

# Verdicts by number; `not_finite` is also the host's where nothing is decided on the device.
VERDICTS = ("sound", "not_finite", "memory_not_finite", "loss_spike", "gradient_spike")
TOLD = {
    "not_finite": "the loss or the gradient of step {step} is not finite",
    "memory_not_finite": "the memory after step {step} has a value that is not a number",
    "loss_spike": "the loss of step {step} ({loss:.4g}) is a spike",
    "gradient_spike": "the gradient norm of step {step} ({grad_norm:.4g}) is a spike",
}
FLOOR = (1e-2, 1e-6)  # nats, gradient norm: values below count as these
LEAST = 0.02  # a deviation of the logarithm below this counts as this, so a steady loss makes no spikes of noise

FLAT = 100  # steps

State = dict[str, Array]  # {"steps": int32 [], "mean": float32 [2], "variance": float32 [2]} of (loss, gradient norm)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """What becomes of bad steps. Run-time."""

    action: Literal["abort", "skip", "rewind"] = "abort"  # end, drop the batch, or go back to before it and drop it
    sigma: float = 0.0  # deviations above the mean of log loss or log gradient norm that are a spike; 0 = no spikes
    horizon: int = 128  # steps over which mean and deviation are taken
    warmup: int = 64  # sound steps before the first spike can be found
    limit: int = 10  # bad steps in a row that are passed; one more ends the training
    drop: int = 1  # rewind: batches dropped, the last of them the bad one
    skip_batches: tuple[int, ...] = ()  # steps whose batch is dropped unseen, for example to resume past a bad one
    watchdog: float = 0.0  # seconds after which a step that hangs ends the process; 0 = none

    def __post_init__(self):
        require_at_least("guard", self, sigma=0, horizon=2, warmup=2, limit=1, drop=1, watchdog=0)
        if any(step < 1 for step in self.skip_batches):
            raise UserError(f"guard.skip_batches={self.skip_batches} must be numbers of steps, which count from 1.")

    @property
    def decides(self) -> bool:
        """Whether the compiled step has a verdict; else its program is the one without guards."""
        return self.action != "abort" or self.sigma > 0


def fresh(config: GuardConfig) -> dict[str, State]:
    """The part of the training state that guards add: {"guard": statistics}, {} if spikes are not looked for."""
    if not config.sigma:
        return {}
    return {"guard": {"steps": jnp.zeros((), jnp.int32), "mean": jnp.zeros(2), "variance": jnp.zeros(2)}}


def settle(config: GuardConfig, old: dict, new: dict, loss: Array, norm: Array) -> tuple[dict, dict[str, Array]]:
    """(the state after the step, {"verdict": number in VERDICTS}); after a bad step `old`, with the step counted.

    loss, norm: of the global batch, the same on all devices.
    """
    if not config.decides:
        return new, {}
    found = jnp.stack([loss, norm])
    verdict = jnp.where(jnp.all(jnp.isfinite(found)), jnp.where(_has_nan(new.get("memory")), 2, 0), 1)
    if config.sigma:
        logs = jnp.log(jnp.maximum(found, jnp.array(FLOOR)))
        high = _spikes(config, old["guard"], logs)
        verdict = jnp.where(verdict > 0, verdict, jnp.where(high[0], 3, jnp.where(high[1], 4, 0)))
        new = new | {"guard": _learnt(config, old["guard"], logs)}
    kept = {name: jax.tree.map(lambda a, b: jnp.where(verdict == 0, b, a), old[name], new[name]) for name in new}
    return kept | {"step": new["step"]}, {"verdict": verdict}


def _has_nan(memory: Any) -> Bool[Array, ""]:
    """Whether a carried memory has a NaN; infinities may be meant."""
    leaves = [x for x in jax.tree.leaves(memory) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.any(jnp.array([jnp.any(jnp.isnan(x)) for x in leaves] or [False]))


def _spikes(config: GuardConfig, guard: State, logs: Float[Array, "2"]) -> Bool[Array, "2"]:
    deviation = jnp.maximum(jnp.sqrt(guard["variance"]), LEAST)
    return (logs > guard["mean"] + config.sigma * deviation) & (guard["steps"] >= config.warmup)


def _learnt(config: GuardConfig, guard: State, logs: Float[Array, "2"]) -> State:
    """The statistics with one more step."""
    steps: Int[Array, ""] = guard["steps"] + 1
    a, away = jnp.maximum(1 / steps, 1 / config.horizon), logs - guard["mean"]
    variance = (1 - a) * (guard["variance"] + a * away**2)
    return {"steps": steps, "mean": guard["mean"] + a * away, "variance": variance}


def verdict_of(row: dict[str, float]) -> str:
    """The verdict on a step, taken out of its metrics. Without one, the loss and the gradient are looked at here."""
    if "verdict" in row:
        return VERDICTS[int(row.pop("verdict"))]
    return "sound" if math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) else "not_finite"


class Rewind(Exception):
    """The training goes back to before step `first` and drops the batches from there to that of the bad `step`."""

    def __init__(self, step: int, first: int, told: str):
        super().__init__(told)
        self.step, self.first, self.told = step, first, told


class Guarded:
    """The training data, with what the guards know of the run; its position, which checkpoints hold, includes both.

    bad: {step: its row of metrics} of the steps that changed nothing. On a way back through them they are dropped.
    statistics: those of `fresh`, on the host, at the last save or restore; None if there are none.
    """

    def __init__(self, data: Any, config: GuardConfig):
        self.data, self.config = data, config
        self.bad: dict[int, dict[str, float]] = {}
        self.statistics: dict[str, np.ndarray] | None = None

    def __next__(self) -> Any:
        return next(self.data)

    def dropped(self, step: int) -> dict[str, float] | None:
        """The row of metrics of a step whose batch is dropped; None for all others."""
        return {"skipped_by_setting": 1.0} if step in self.config.skip_batches else self.bad.get(step)

    def pass_bad(self, step: int, row: dict[str, float], verdict: str, saved: int) -> dict[str, float]:
        """Skips a bad step, which has changed nothing, and returns its row of metrics.

        saved: the newest checkpoint. Raises Diverged if the training ends here, Rewind if it goes back.
        """
        config, told = self.config, TOLD[verdict].format(step=step, **row)
        before = next(n for n in itertools.count() if step - n - 1 not in self.bad)  # bad steps in a row before it
        if config.action == "abort" or before >= config.limit:
            if config.action != "abort":
                told = f"{told}, after {before} bad steps in a row, as many as guard.limit lets pass"
            kept = f"the checkpoint of step {saved} is sound" if saved else "nothing was saved yet"
            past = " ".join(map(str, [*config.skip_batches, step]))
            raise Diverged(
                f"{told}; {kept}. Resume with --guard.skip-batches {past} to go past this batch, or start again in "
                "another --run-dir with a lower --optimizer.learning-rate."
            )
        self.bad[step] = row | {f"skipped_{verdict}": 1.0}
        if config.action == "rewind":
            first = max(step - config.drop + 1, 1)
            self.bad |= {n: {"skipped_before_bad": 1.0} for n in range(first, step)}
            raise Rewind(step, first, told)
        return self.bad[step]

    def skipped(self, step: int) -> int:
        """Bad steps so far, of those known to this process."""
        return sum(bad <= step for bad in self.bad)

    def get_state(self) -> dict[str, Any]:
        """The position in the data, and the guards' part, if any. Its numbers are texts: no position is negative."""
        bad = {str(step): {k: repr(float(v)) for k, v in row.items()} for step, row in self.bad.items()}
        found = {"bad": bad} if bad else {}
        if self.statistics is not None:
            found["statistics"] = {k: list(map(repr, np.ravel(x).tolist())) for k, x in self.statistics.items()}
        return self.data.get_state() | ({"guard": found} if found else {})

    def set_state(self, position: dict[str, Any]) -> None:
        """Continues from a position. Raises an error of any type if it makes no sense."""
        guard = dict(position).pop("guard", {})
        bad = {int(s): {k: float(v) for k, v in row.items()} for s, row in guard.get("bad", {}).items()}
        self.data.set_state({name: value for name, value in position.items() if name != "guard"})
        self.bad = bad | self.bad  # a way back forgets none
        self.statistics = _read(guard["statistics"]) if "statistics" in guard else None


def _read(texts: dict[str, list[str]]) -> dict[str, np.ndarray]:
    """The statistics that `get_state` wrote."""
    mean, variance = (np.array(list(map(float, texts[name])), np.float32) for name in ("mean", "variance"))
    if mean.shape != (2,) or variance.shape != (2,):
        raise ValueError("the guard's statistics are not two means and two variances")
    return {"steps": np.array(int(texts["steps"][0]), np.int32), "mean": mean, "variance": variance}


class FlatLoss:
    """Notices a loss that stays above that of a uniform guess for `FLAT` steps after the warmup."""

    def __init__(self, experiment: Any):
        self._vocab = getattr(experiment.model, "vocab_size", experiment.data.vocab_size)
        self._warmup = experiment.optimizer.schedule.warmup_steps
        self._steps = 0  # in a row

    def seen(self, step: int, loss: float | None) -> str | None:
        """A warning, once, when it is time for one; loss: None of a dropped batch."""
        uniform = math.log(self._vocab)
        self._steps = self._steps + 1 if step > self._warmup and (loss or 0.0) > uniform else 0
        if self._steps != FLAT:
            return None
        return (
            f"the loss has been above {uniform:.4g}, that of a uniform guess among {self._vocab} tokens, for {FLAT} "
            "steps; check the data, or lower --optimizer.learning-rate."
        )
