"""Comparing experiments fairly: the same data, steps and learning-rate grid for all, several seeds at the best rate.

Every experiment is trained at every learning rate of the grid with seed 0, then at the best rate with seeds 1, 2, ....
Only these seeds are judged, because seed 0 was selected for its score. Each run has its own folder, so an interrupted
comparison continues where it stopped. `engrax.evals.verdicts` turns the scores into verdicts.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from engrax.errors import Diverged, UserError
from engrax.evals import scoring
from engrax.files import expect, read_json, refuse_links, short, write_atomically
from engrax.train import cost, loop, metrics, runs, sharding
from engrax.train.experiment import Experiment

LEARNT = 0.95  # accuracy at which a task counts as learnt


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


class Trial(NamedTuple):
    """One run: an experiment at one learning rate with one seed."""

    name: str
    learning_rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Score:
    """The score of a trial's last checkpoint on every validation row; `sums` is None if the training diverged."""

    sums: np.ndarray | None  # [N] bits (text, tokens) or correctly predicted tokens (task)
    counts: np.ndarray | None  # [N] bytes, tokens or labelled tokens
    learnt_at: int | None = None  # first validated step with an accuracy of LEARNT; tasks only
    seconds: float = 0.0  # time of training and scoring

    @property
    def mean(self) -> float:
        """sums / counts over all rows; nan if the training diverged."""
        return float("nan") if self.sums is None else float(self.sums.sum() / self.counts.sum())


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
    folder = runs.folder(folder)
    runs.refuse_file(folder)
    refuse_links(folder)
    for name, experiment in comparison.experiments.items():  # before any training
        loop.check(experiment, folder / folder_of(name))
    trials = len(comparison.experiments) * (len(comparison.learning_rates) + comparison.seeds)
    tell = _progress(trials) if progress else lambda trial, score: None
    sign = 1 if kind(comparison) == "task" else -1
    return [_row(comparison, name, folder, tell, sign) for name in comparison.experiments]


def _row(comparison: Comparison, name: str, folder: epath.Path, tell: Callable, sign: int) -> Row:
    """Runs the trials of the grid, then those of the judged seeds."""
    scored = {trial: _score(comparison, trial, folder, tell) for trial in _grid(name, comparison.learning_rates)}
    sound = [t for t, score in scored.items() if score.sums is not None]
    if not sound:
        raise UserError(f"{name!r} diverged at every learning rate of the grid; give lower ones.")
    best = max(sound, key=lambda t: sign * scored[t].mean)
    seeds = range(1, comparison.seeds + 1)
    scores = tuple(_score(comparison, best._replace(seed=seed), folder, tell) for seed in seeds)
    if all(score.sums is None for score in scores):
        raise UserError(
            f"{name!r} diverged with every judged seed at its best learning rate {best.learning_rate:g}; "
            "give lower ones."
        )
    grid = {t.learning_rate: score.mean for t, score in scored.items()}
    return Row(name, best.learning_rate, grid, scores, cost.costs(comparison.experiments[name]))


def _grid(name: str, learning_rates: tuple[float, ...]) -> Iterator[Trial]:
    return (Trial(name, rate, 0) for rate in learning_rates)


def folder_of(name: str) -> str:
    """The folder of an experiment's runs."""
    return name.replace(" ", "_")


def _score(comparison: Comparison, trial: Trial, folder: epath.Path, tell: Callable) -> Score:
    """The trial's score, read from its file if it exists, otherwise computed by training."""
    directory = folder / folder_of(trial.name) / f"lr_{trial.learning_rate:g}_seed_{trial.seed}"
    experiment = comparison.experiments[trial.name]
    optimizer = dataclasses.replace(experiment.optimizer, learning_rate=trial.learning_rate)
    experiment = dataclasses.replace(experiment, seed=trial.seed, optimizer=optimizer)
    written = directory / "evals" / "comparison.json"
    if written.exists():
        old = runs.open_run(directory)
        runs.refuse_differences(old.experiment, experiment, old.experiment.steps, directory)
        score = _read(read_json(written), written)
        tell(trial, dataclasses.replace(score, seconds=0.0))
        return score
    begun = time.perf_counter()
    try:
        trained = loop.train(experiment, directory, progress=False)
        if not trained.finished:
            told = f"stopped at {trial.name!r}; the same command continues from there."
            raise KeyboardInterrupt(told) if trained.interrupted else UserError(told)
        score = _measure(directory)
    except Diverged:
        score = Score(None, None)
    score = dataclasses.replace(score, seconds=time.perf_counter() - begun)
    written.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(written, json.dumps(_written(score)) + "\n")
    tell(trial, score)
    return score


def _measure(directory: epath.Path) -> Score:
    """Scores the last checkpoint of a run on its validation rows."""
    opened = runs.open_run(directory)
    experiment = opened.experiment
    mesh = sharding.evaluation_mesh(experiment.parallel)
    model, step = opened.load(mesh=mesh)
    rows = scoring.validation_rows(experiment, None)
    with sharding.use_mesh(mesh):
        scores = scoring.Scorer(experiment, model, mesh).score(rows)
    what = scoring.kind_of(experiment)
    values = scores.right if what == "task" else scores.nats / np.log(2)
    if not np.isfinite(scores.nats).all():
        raise Diverged(f"the loss of step {step} of {directory} is not a number on the validation rows.")
    labelled = np.where(rows.labelled, values, 0).astype(float)
    learnt = [r["step"] for r in metrics.read(directory) if r.get("validation_accuracy", 0.0) >= LEARNT]
    return Score(
        sums=labelled.sum(axis=1),
        counts=scoring.divisors(rows, what).sum(axis=1),
        learnt_at=min(learnt, default=None) if what == "task" else None,
    )


def _written(score: Score) -> dict[str, Any]:
    """The score as JSON."""
    arrays = {name: None if value is None else value.tolist() for name, value in vars(score).items() if name in _ARRAYS}
    return arrays | {"learnt_at": score.learnt_at, "seconds": score.seconds}


def _read(data: dict[str, Any], path: Any) -> Score:
    """The inverse of `_written`. Raises UserError if the data in `path` are invalid."""
    arrays = {}
    for name in _ARRAYS:
        values = data.get(name)
        for value in expect(values, list, f"{path}: {name}") if values is not None else ():
            expect(value, float, f"{path}: {name}")
        arrays[name] = None if values is None else np.asarray(values)
    if (arrays["sums"] is None) != (arrays["counts"] is None) or len({np.shape(a) for a in arrays.values()}) > 1:
        raise UserError(f"{path}: sums and counts do not belong together ({short(data)}); delete the file.")
    learnt = data.get("learnt_at")
    learnt = learnt if learnt is None else expect(learnt, int, f"{path}: learnt_at")
    return Score(**arrays, learnt_at=learnt, seconds=float(expect(data.get("seconds"), float, f"{path}: seconds")))


_ARRAYS = ("sums", "counts")


def _progress(trials: int) -> Callable[[Trial, Score], None]:
    """Prints a line on stderr after every trial, with the time left."""
    done, spent = [], []

    def tell(trial: Trial, score: Score) -> None:
        done.append(trial)
        spent.extend([score.seconds] if score.seconds else [])
        left = (trials - len(done)) * float(np.mean(spent)) / 60 if spent else 0.0
        result = "diverged" if score.sums is None else f"{score.mean:.4f}"
        where = f"{trial.name}, learning rate {trial.learning_rate:g}, seed {trial.seed}"
        print(f"[{len(done)}/{trials}] {where}: {result} ({left:.0f} min left)", file=sys.stderr, flush=True)

    return tell
