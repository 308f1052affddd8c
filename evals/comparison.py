"""Comparing experiments fairly: the same data, steps and learning-rate grid for all, several seeds at the best rate.

Every experiment is trained at every learning rate of the grid with seed 0, then at the best rate with seeds 1, 2, ....
Only these seeds are judged, because seed 0 was selected for its score. With several tasks this is done for each, with
one table per task. Each run has its own folder, so an interrupted comparison continues where it stopped.
`engrax.evals.verdicts` turns the scores into verdicts.
"""

import dataclasses
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from etils import epath

from engrax.errors import UserError
from engrax.evals import scoring, sweep
from engrax.evals.trials import Score, Trial
from engrax.train import cost
from engrax.train.experiment import Experiment, replace

RATE = "optimizer.learning_rate"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published ordering: `better` scores better than `worse`, both names of experiments in the comparison."""

    better: str
    worse: str
    source: str  # the source, with its numbers


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Experiments that differ only in their model, with their shared grid and claims about them.

    Raises UserError if they differ in data, steps or batch, or if a claim names an unknown experiment.
    """

    experiments: dict[str, Experiment]  # by their names in the table; the first is the baseline
    learning_rates: tuple[float, ...]  # the grid, three or more
    seeds: int = 3  # seeds at the best learning rate, in addition to the grid's seed; 1 = a look, without verdicts
    claims: tuple[Claim, ...] = ()
    tasks: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)  # by name: fields replaced, as "data"

    def __post_init__(self):
        if len(self.experiments) < 2:
            raise UserError("a comparison needs at least two experiments.")
        if len(set(self.learning_rates)) < 3 or (self.seeds < 3 and self.seeds != 1):
            raise UserError(
                f"learning_rates={self.learning_rates} and seeds={self.seeds}: a fair comparison has at least three "
                "of each (and one seed is a look, without verdicts)."
            )
        first, *others = self.experiments
        for name in others:
            for field in ("data", "steps", "batch_size"):
                if getattr(self.experiments[name], field) != getattr(self.experiments[first], field):
                    raise UserError(f"{name!r} and {first!r} differ in {field}: they cannot be compared.")
        folders = [folder_of(name) for name in self.experiments]
        if len(set(folders)) < len(folders):
            raise UserError(f"the experiments' names {', '.join(self.experiments)} do not differ enough for folders.")
        for claim in self.claims:
            for name in (claim.better, claim.worse):
                if name not in self.experiments:
                    raise UserError(f"a claim names {name!r}, which is not an experiment of the comparison.")
        if len({folder_of(name) for name in self.tasks}) < len(self.tasks):
            raise UserError(f"the tasks' names {', '.join(self.tasks)} do not differ enough for folders.")

    def parts(self) -> "dict[str, Comparison]":
        """A comparison of one task each, by the task's name; {"": itself} if it has no named tasks."""
        if not self.tasks:
            return {"": self}
        return {
            task: dataclasses.replace(
                self, tasks={}, experiments={name: replace(e, fields) for name, e in self.experiments.items()}
            )
            for task, fields in self.tasks.items()
        }


@dataclasses.dataclass(frozen=True)
class Row:
    """An experiment's measurements for its row of the table."""

    name: str
    learning_rate: float  # the best
    grid: dict[float, float]  # learning rate -> score with seed 0, nan where it diverged
    scores: tuple[Score, ...]  # one per judged seed, at the best learning rate
    costs: dict[str, Any]


def kind(comparison: Comparison) -> str:
    """text (bits per byte), tokens (bits per token) or task (accuracy): the same for all experiments."""
    return scoring.kind_of(next(iter(comparison.experiments.values())))


@dataclasses.dataclass(frozen=True)
class Ran:
    """The rows of a comparison's tables."""

    rows: dict[str, list[Row]]  # by task, "" if the comparison names none; experiments with all their trials
    missing: dict[str, str]  # why the others have no row, by TASK/NAME or NAME


def run(
    comparison: Comparison,
    folder: epath.PathLike,
    *,
    processes: int = 1,
    minutes: float | None = None,
    progress: bool = True,
) -> Ran:
    """Trains and scores the trials missing in `folder` (`engrax.evals.sweep`): first the grids, then the judged seeds.

    Raises UserError if no experiment has all its trials, or if a run in the folder is another experiment.
    """
    parts = comparison.parts()
    experiments = {(task, name): e for task, part in parts.items() for name, e in part.experiments.items()}
    options = dict(processes=processes, minutes=minutes, progress=progress)
    judged = grid_then_seeds(experiments, comparison.learning_rates, comparison.seeds, folder, **options)
    rows: dict[str, list[Row]] = {task: [] for task in parts}
    for key, found in judged.found.items():
        rows[key[0]].append(Row(key[1], found.rate, found.grid, found.scores, cost.costs(experiments[key])))
    missing = {"/".join(filter(None, key)): judged.absent[key] for key in experiments if key in judged.absent}
    if not any(rows.values()):
        name, why = next(iter(missing.items()))
        raise UserError(f"no experiment has all its trials, so there is no table yet; {name!r}: {why}.")
    return Ran({task: found for task, found in rows.items() if found}, missing)


Key = tuple[str, str]  # an experiment's task, "" if it has no named one, and its name


class Judged(NamedTuple):
    """One experiment's trials."""

    rate: float  # the best of the grid
    grid: dict[float, float]  # learning rate -> score with seed 0, nan where it diverged
    scores: tuple[Score, ...]  # one per judged seed
    trials: tuple[Trial, ...]  # of the judged seeds


class AllJudged(NamedTuple):
    """The experiments whose trials are all there, and why the others are not."""

    found: dict[Key, Judged]
    absent: dict[Key, str]


def grid_then_seeds(
    experiments: dict[Key, Experiment],
    rates: tuple[float, ...],
    seeds: int,
    folder: epath.PathLike,
    *,
    processes: int = 1,
    minutes: float | None = None,
    progress: bool = True,
) -> AllJudged:
    """Trains and scores every experiment at every rate with seed 0, then at its best rate with seeds 1 to `seeds`.

    Raises UserError if a run in the folder is another experiment.
    """
    started = time.monotonic()

    def trials(key: Key, chosen: Iterable[tuple[float, int]]) -> list[Trial]:
        return [trial_of(*key, experiments[key], *choice) for choice in chosen]

    def outcome(planned: dict[Key, list[Trial]], later: int) -> sweep.Outcome:
        left = minutes if minutes is None else max(0.0, minutes - (time.monotonic() - started) / 60)
        every = [trial for trials in planned.values() for trial in trials]
        return sweep.run(every, folder, processes=processes, minutes=left, progress=progress, later=later)

    grid = {key: trials(key, ((rate, 0) for rate in rates)) for key in experiments}
    found = outcome(grid, len(experiments) * seeds)
    best, absent = {}, {}
    for key, planned in grid.items():
        sign = 1 if scoring.kind_of(experiments[key]) == "task" else -1
        sound = [t for t in planned if t.name in found.scores and found.scores[t.name].sums is not None]
        if why := _why(planned, found):
            absent[key] = why
        elif not sound:
            absent[key] = "it diverged at every learning rate of the grid; give lower ones"
        else:
            best[key] = max(sound, key=lambda trial: sign * found.scores[trial.name].mean).settings[RATE]
    judged = {key: trials(key, ((rate, seed) for seed in range(1, seeds + 1))) for key, rate in best.items()}
    last = outcome(judged, 0)
    sound = {}
    for key, planned in judged.items():
        scores = tuple(last.scores[trial.name] for trial in planned if trial.name in last.scores)
        if why := _why(planned, last):
            absent[key] = why
        elif all(score.sums is None for score in scores):
            absent[key] = f"it diverged with every judged seed at its best learning rate {best[key]:g}; give lower ones"
        else:
            by_rate = {trial.settings[RATE]: found.scores[trial.name].mean for trial in grid[key]}
            sound[key] = Judged(best[key], by_rate, scores, tuple(planned))
    return AllJudged(sound, absent)


def _why(planned: list[Trial], outcome: sweep.Outcome) -> str | None:
    """Why a row cannot be made: the first trial without a score."""
    lost = [trial.name for trial in planned if trial.name in outcome.missing]
    return f"{len(lost)} of {len(planned)} trials are missing, {lost[0]}: {outcome.missing[lost[0]]}" if lost else None


def trial_of(task: str, name: str, experiment: Experiment, rate: float, seed: int) -> Trial:
    """An experiment at one learning rate with one seed."""
    where = "/".join(folder_of(part) for part in (task, name) if part)
    return Trial(f"{where}/lr_{rate:g}_seed_{seed}", experiment, {RATE: rate, "seed": seed})


def folder_of(name: str) -> str:
    """The folder of an experiment's or a task's runs."""
    return name.replace(" ", "_")
