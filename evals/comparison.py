"""Comparing experiments fairly: the same data, steps and learning-rate grid for all, several seeds at the best rate.

Every experiment is trained at every learning rate of the grid with seed 0, then at the best rate with seeds 1, 2, ....
Only these seeds are judged, because seed 0 was selected for its score. Each run has its own folder, so an interrupted
comparison continues where it stopped. `engrax.evals.verdicts` turns the scores into verdicts.
"""

import dataclasses
from typing import Any

from etils import epath

from engrax.errors import UserError
from engrax.evals import scoring, sweep
from engrax.evals.trials import Score, Trial
from engrax.train import cost
from engrax.train.experiment import Experiment

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
    seeds: int = 3  # seeds at the best learning rate, in addition to the grid's seed
    claims: tuple[Claim, ...] = ()

    def __post_init__(self):
        if len(self.experiments) < 2:
            raise UserError("a comparison needs at least two experiments.")
        if len(set(self.learning_rates)) < 3 or self.seeds < 3:
            raise UserError(
                f"learning_rates={self.learning_rates} and seeds={self.seeds}: a fair comparison has at least three "
                "of each."
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


def run(comparison: Comparison, folder: epath.PathLike, *, progress: bool = True) -> list[Row]:
    """Trains and scores the trials missing in `folder`, and returns a row for every experiment.

    Raises UserError if all learning rates or all judged seeds of an experiment diverged, or if a run in the folder is
    another experiment.
    """
    sign = 1 if kind(comparison) == "task" else -1
    seeds = range(1, comparison.seeds + 1)
    count = len(comparison.experiments)
    grid = {
        name: [_trial(comparison, name, rate, 0) for rate in comparison.learning_rates]
        for name in comparison.experiments
    }
    scores = _scores(sweep.run(sum(grid.values(), []), folder, progress=progress, later=count * len(seeds)))
    best = {}
    for name, trials in grid.items():
        sound = [trial for trial in trials if scores[trial.name].sums is not None]
        if not sound:
            raise UserError(f"{name!r} diverged at every learning rate of the grid; give lower ones.")
        best[name] = max(sound, key=lambda trial: sign * scores[trial.name].mean).settings[RATE]
    judged = {name: [_trial(comparison, name, rate, seed) for seed in seeds] for name, rate in best.items()}
    scores |= _scores(sweep.run(sum(judged.values(), []), folder, progress=progress))
    rows = []
    for name, trials in judged.items():
        found = tuple(scores[trial.name] for trial in trials)
        if all(score.sums is None for score in found):
            raise UserError(
                f"{name!r} diverged with every judged seed at its best learning rate {best[name]:g}; give lower ones."
            )
        rates = {trial.settings[RATE]: scores[trial.name].mean for trial in grid[name]}
        rows.append(Row(name, best[name], rates, found, cost.costs(comparison.experiments[name])))
    return rows


def _scores(outcome: sweep.Outcome) -> dict[str, Score]:
    if outcome.missing:
        name, why = next(iter(outcome.missing.items()))
        raise UserError(f"the trial {name} has no score: {why}")
    return outcome.scores


def _trial(comparison: Comparison, name: str, rate: float, seed: int) -> Trial:
    """An experiment at one learning rate with one seed."""
    where = f"{folder_of(name)}/lr_{rate:g}_seed_{seed}"
    return Trial(where, comparison.experiments[name], {RATE: rate, "seed": seed})


def folder_of(name: str) -> str:
    """The folder of an experiment's runs."""
    return name.replace(" ", "_")
