"""A trial: an experiment with some fields replaced, trained in its own folder and scored on its validation rows."""

import dataclasses
import json
import math
import time
from typing import Any

import numpy as np
from etils import epath

from engrax.errors import Diverged, UserError
from engrax.evals import scoring
from engrax.files import expect, read_json, short, write_atomically
from engrax.train import experiment as experiments
from engrax.train import loop, metrics, runs, sharding
from engrax.train.experiment import Experiment

LEARNT = 0.95  # accuracy at which a task counts as learnt
WRITTEN = "comparison.json"  # the score, in the run's evals/


class Stopped(UserError):
    """A signal stopped a training."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep. Raises UserError if a setting names an unknown field or has the wrong type."""

    name: str  # unique in its sweep; also the path of the run inside the sweep's folder, spaces as "_"
    experiment: Experiment
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted field -> its value in this trial

    def __post_init__(self):
        parts = self.name.split("/")
        if any(part.strip() in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
            raise UserError(f"the trial's name {short(self.name)} is no path inside a folder; give another.")
        self.config  # noqa: B018, raises here rather than in the middle of a sweep

    @property
    def config(self) -> Experiment:
        """The experiment with the settings."""
        return experiments.replace(self.experiment, self.settings)

    @property
    def path(self) -> str:
        """The path of the run inside the sweep's folder."""
        return self.name.replace(" ", "_")


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


def better(score: float, other: float, experiment: Experiment) -> bool:
    """Whether a mean score is better than another one: higher for a task, lower for bits; nan is never better."""
    if math.isnan(other):
        return not math.isnan(score)
    return score > other if scoring.kind_of(experiment) == "task" else score < other


def read(experiment: Experiment, directory: epath.Path) -> Score | None:
    """The score written in a run folder, None if there is none. Raises UserError if the run is another experiment."""
    written = directory / "evals" / WRITTEN
    if not written.exists():
        return None
    old = runs.open_run(directory)
    runs.refuse_differences(old.experiment, experiment, old.experiment.steps, directory)
    return _read(read_json(written), written)


def score(experiment: Experiment, directory: epath.Path) -> Score:
    """Trains the experiment, from its last checkpoint if there is one, and writes its score into the run folder.

    Raises Stopped or KeyboardInterrupt if a signal stopped the training.
    """
    started = time.perf_counter()
    try:
        trained = loop.train(experiment, directory, progress=False)
        if not trained.finished:
            told = f"stopped in {directory}; the same command continues from there."
            raise KeyboardInterrupt(told) if trained.interrupted else Stopped(told)
        found = measure(directory)
    except Diverged:
        found = Score(None, None)
    found = dataclasses.replace(found, seconds=time.perf_counter() - started)
    written = directory / "evals" / WRITTEN
    written.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(written, json.dumps(_written(found)) + "\n")
    return found


def measure(directory: epath.Path, rows: scoring.Rows | None = None) -> Score:
    """Scores the last checkpoint of a run on these rows; None = its validation rows."""
    opened = runs.open_run(directory)
    experiment = opened.experiment
    mesh = sharding.evaluation_mesh(experiment.parallel)
    model, step = opened.load(mesh=mesh)
    rows = scoring.validation_rows(experiment, None) if rows is None else rows
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


def _written(found: Score) -> dict[str, Any]:
    """The score as JSON."""
    arrays = {name: None if value is None else value.tolist() for name, value in vars(found).items() if name in _ARRAYS}
    return arrays | {"learnt_at": found.learnt_at, "seconds": found.seconds}


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
