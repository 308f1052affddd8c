"""One cell of an evaluation on generated tasks: a model's answers to the rows of one setting, and their cost.

Finished cells are kept in RUN/evals/task_cells.json. A cell is used again only if all that it depends on is the same:
parameters, model, task, number of rows, code, device. The file can be deleted at any time.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from engrax import models
from engrax.data.task import TaskConfig
from engrax.data.text_task import TextTask
from engrax.errors import UserError
from engrax.evals import scoring, text_answers
from engrax.evals import statistics as stats
from engrax.evals.context import Context
from engrax.evals.statistics import Estimate
from engrax.files import expect, read_json, write_atomically
from engrax.train import cost, runs
from engrax.train.checkpoint import flatten
from engrax.train.experiment import Experiment, from_dict, to_dict

FORMAT = 1  # of a cell, and of what its numbers mean
NAME = "task_cells.json"


@dataclasses.dataclass(frozen=True)
class Slice:
    """The answers of one kind."""

    name: str
    labels: int
    accuracy: Estimate


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """A number that a mixer reports for every row; None if it is not finite."""

    name: str
    block: str
    median: float | None
    p99: float | None


@dataclasses.dataclass(frozen=True)
class Cell:
    """The results of one setting. If the task counts whole rows, a hit is a row with all its labels right; of a task in
    words, what the task's own rule finds in the model's answer."""

    examples: int  # rows
    labels: int
    hits: tuple[int, ...]  # of every row
    trials: tuple[int, ...]  # of every row: its labels, or 1 for a task that counts whole rows
    accuracy: Estimate  # hits / trials
    label_accuracy: Estimate  # right labels / labels
    nats: Estimate | None  # -log p of a label; None if one is not a number, which then counts as wrong
    chance: float  # expected accuracy of a uniform guess
    chance_in_context: float | None
    oracle: float
    slices: tuple[Slice, ...]
    tokens_per_second: float
    state_bytes: int  # of one sequence after the row
    state_bytes_by_mixer: tuple[tuple[str, int], ...]
    peak_bytes: int  # of the compiled pass, on one device
    diagnostics: tuple[Diagnostic, ...]

    def part(self, name: str) -> Estimate | None:
        """The accuracy of a slice; None if no label is in it."""
        return next((part.accuracy for part in self.slices if part.name == name), None)


class Cells:
    """The cells of one model: measured, or found in the run's file."""

    def __init__(self, context: Context, model: nnx.Module, step: int, examples: int):
        self.context, self.model, self.step, self.examples = context, model, step, examples
        self.path = context.run.directory / "evals" / NAME
        self._scorers: dict[int, scoring.Scorer] = {}
        experiment = context.experiment
        device = jax.devices()[0]
        self._same = {
            "format": FORMAT,
            "step": step,
            "parameters": parameters_digest(model),
            "model": to_dict(experiment.model),
            "compute_dtype": experiment.compute_dtype,
            "batch_size": experiment.batch_size // experiment.optimizer.accumulate,
            "examples": examples,
            "device": f"{device.platform}: {device.device_kind}",
            "devices": 1 if context.mesh is None else context.mesh.size,
            "commit": runs.commit(),
            "jax": jax.__version__,
        }

    def key(self, task: TaskConfig) -> str:
        """The name of a cell in the file: a digest of all that it depends on."""
        same = self._same | {"task": to_dict(task)}
        if isinstance(task, TextTask):  # the task's dict has only the paths of its texts
            same["made_of"] = [task.tokenizer.manifest, *task.made_of()]
        return hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()

    def find(self, task: TaskConfig) -> Cell | None:
        """The finished cell of these settings. Raises UserError if the file is damaged."""
        found = _read(self.path).get(self.key(task))
        if found is None:
            return None
        cell = expect(found, dict, f"{self.path}: a cell").get("result")
        return from_dict(expect(cell, dict, f"{self.path}: a cell's result"), Cell, str(self.path))

    def measure(self, task: TaskConfig, tick: Callable[[int], Any]) -> Cell:
        """Measures a cell and adds it to the file; `tick(1)` is called `calls(task)` times."""
        if task.seq_len not in self._scorers:
            alike = on(self.context.experiment, task)
            self._scorers[task.seq_len] = scoring.Scorer(alike, self.model, self.context.mesh)
        cell = measure(self.context, self._scorers[task.seq_len], task, self.examples, tick)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        entry = {"task": to_dict(task), "step": self.step, "result": to_dict(cell)}
        cells = _read(self.path) | {self.key(task): entry}  # read again: another evaluation may have added some
        write_atomically(self.path, json.dumps({"cells": cells}, allow_nan=False) + "\n")
        return cell

    def calls(self, task: TaskConfig) -> int:
        """Batches of a cell, and one for its diagnostics."""
        calls = -(-self.examples // scoring.batch_rows(on(self.context.experiment, task))) + 1
        return calls + (text_answers.calls(task, self.examples) if isinstance(task, TextTask) else 0)


def _read(path: epath.Path) -> dict[str, Any]:
    """The cells of a file, by key; {} if there is none."""
    if not path.exists():
        return {}
    remedy = "delete it: its results can be computed again"
    found = read_json(path, remedy).get("cells")
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged (no cells in it); {remedy}.")
    return found


def parameters_digest(model: nnx.Module) -> str:
    """The SHA-256 of a model's parameters."""
    digest = hashlib.sha256()
    for name, array in sorted(flatten(nnx.state(model, nnx.Param)).items()):
        digest.update(f"{name} {array.shape} {array.dtype} ".encode() + np.asarray(array).tobytes())
    return digest.hexdigest()


def on(experiment: Experiment, task: TaskConfig) -> Experiment:
    """The experiment with another task as its data."""
    return dataclasses.replace(experiment, data=task)


def measure(
    context: Context,
    scorer: scoring.Scorer,
    task: TaskConfig,
    examples: int,
    tick: Callable[[int], Any] = lambda n: None,
) -> Cell:
    """The cell of the first `examples` validation rows of a task; the scorer is for rows of the task's length."""
    padded = task_rows(task, examples, scorer.rows)
    scores, rows = scorer.score(padded, tick=tick), padded.take(slice(examples), complete=False)
    nats, labelled = scores.nats[:examples], rows.labelled
    finite = np.isfinite(nats)
    right = scores.right[:examples] & finite
    hits, trials = _counted(task, right, labelled)
    slices, guess = _slices(task, rows, right), chance(task, labelled)
    if isinstance(task, TextTask):
        slices, guess = (Slice("exact match", len(hits), stats.proportion(hits, trials)),), task.guess
        hits, trials = text_answers.judged(context, scorer, task, finite.all(axis=1), tick)
        solved = text_answers.of_oracle(task, examples)
    else:
        solved, _ = _counted(task, (task.solve(rows.tokens) == rows.targets) & labelled, labelled)
    state = state_at(context.experiment, task.seq_len)
    reported = scorer.report(rows)
    tick(1)
    return Cell(
        examples=int(labelled.any(axis=1).sum()),
        labels=int(labelled.sum()),
        hits=tuple(hits[:, 0].tolist()),
        trials=tuple(trials[:, 0].tolist()),
        accuracy=stats.proportion(hits, trials),
        label_accuracy=stats.proportion(right, labelled),
        nats=stats.mean(nats, labelled) if finite.all() else None,
        chance=guess,
        chance_in_context=getattr(task, "chance_in_context", None),
        oracle=float(solved.sum() / trials.sum()),
        slices=slices,
        tokens_per_second=scores.tokens_per_second,
        state_bytes=state["total"],
        state_bytes_by_mixer=tuple(state["by_mixer"].items()),
        peak_bytes=scorer.peak_bytes(padded),
        diagnostics=_diagnostics(context, reported),
    )


def task_rows(task: TaskConfig, examples: int, multiple: int) -> scoring.Rows:
    """The first `examples` validation rows, and rows of padding up to a multiple, so that all batches are alike."""
    tokens, targets = task.generate("validation", np.arange(examples))
    arrays = {"tokens": (tokens, 0), "targets": (targets, -1), "segment_ids": (np.zeros_like(tokens), -1)}
    fill = ((0, -examples % multiple), (0, 0))
    padded = {name: np.pad(array, fill, constant_values=value) for name, (array, value) in arrays.items()}
    return scoring.Rows(**padded, target_bytes=None, complete=False)


def _counted(task: TaskConfig, right: np.ndarray, labelled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hits and trials of every row, [N, 1]: labels, or whole rows."""
    hits, trials = (np.sum(x, axis=1, keepdims=True) for x in (right, labelled))
    if task.whole_rows:
        hits, trials = (hits == trials) & (trials > 0), trials > 0
    return hits.astype(int), trials.astype(int)


def chance(task: TaskConfig, labelled: np.ndarray) -> float:
    """The expected accuracy of a uniform guess; of whole rows, the mean over rows of all labels guessed right."""
    if not task.whole_rows:
        return float(task.chance)
    labels = labelled.sum(axis=1)
    return float(np.mean(task.chance ** labels[labels > 0]))


def _slices(task: TaskConfig, rows: scoring.Rows, right: np.ndarray) -> tuple[Slice, ...]:
    """The accuracies by kind of label; () if there is only one kind."""
    names, index = task.slices(rows.arrays())
    found = []
    for i, name in enumerate(names):
        of = (index == i) & rows.labelled
        if of.any():
            found.append(Slice(name, int(of.sum()), stats.proportion(right & of, of)))
    return tuple(found) if len(found) > 1 else ()


def _diagnostics(context: Context, reported: dict[str, np.ndarray]) -> tuple[Diagnostic, ...]:
    """The diagnostics that are one number per row and block."""

    def plain(value):
        return float(value) if math.isfinite(value) else None

    return tuple(
        Diagnostic(name, context.block(name, repeat), *map(plain, (np.median(of), np.percentile(of, 99))))
        for name, values in reported.items()
        if values.ndim == 2
        for repeat, of in enumerate(values.T)
    )


def state_at(experiment: Experiment, tokens: int) -> dict[str, Any]:
    """Bytes of the state of one sequence after a row of `tokens` tokens: {"total", "by_mixer"}.

    A cache of declared capacity is allocated for the longest row. Only the slots that the row uses count.
    """
    held = dataclasses.replace(experiment, model=_fit(experiment.model, tokens))
    return cost.state_bytes(held, nnx.eval_shape(lambda: models.build(held.model, rngs=nnx.Rngs(0))))


def _fit(config: Any, tokens: int) -> Any:
    """The config with key-value caches of at most `tokens` tokens."""
    if isinstance(config, (tuple, list)):
        return type(config)(_fit(item, tokens) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    changes = {}
    for field in dataclasses.fields(config):
        old = getattr(config, field.name)
        if field.name == "capacity":
            new = min(old, tokens)
        elif field.name == "window" and old is not None and hasattr(config, "capacity"):
            new = min(old, tokens + 1)  # its cache holds window - 1 tokens
        else:
            new = _fit(old, tokens)
        if field.init and new is not old and new != old:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config
