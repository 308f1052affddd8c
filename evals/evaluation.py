"""Evaluating a checkpoint of a run: runs the applicable evaluators and writes numbers, plots and a report."""

import csv
import dataclasses
import datetime
import io
import itertools
import json
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from engrax.errors import UserError
from engrax.evals.context import Context
from engrax.evals.evaluator import EVALUATORS, Evaluation, EvaluatorConfig
from engrax.evals.evaluators.tasks import TasksConfig, config_of
from engrax.files import write_atomically
from engrax.train import experiment as experiments
from engrax.train import runs, sharding
from engrax.train.experiment import Experiment

FORMAT_VERSION = 2  # of results.json


@dataclasses.dataclass(frozen=True, repr=False)
class Results:
    """A finished evaluation; `data` is the content of results.json, and str() gives the main numbers."""

    directory: epath.Path  # RUN/evals/step_N, or step_N-2, ... if that exists
    data: dict[str, Any]
    lines: list[tuple[str, str]]  # (name, value) of the evaluators for the terminal

    @property
    def step(self) -> int:
        """The evaluated step."""
        return self.data["step"]

    @property
    def report(self) -> epath.Path:
        """The self-contained page."""
        return self.directory / "report.html"

    @property
    def evaluations(self) -> dict[str, Any]:
        """The values of each evaluator, by its name."""
        return self.data["evaluations"]

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of the validation text; None if the data is not text or `validation` was not run."""
        found = self.evaluations.get("validation", {}).get("bits_per_byte")
        return found and found["value"]

    @property
    def accuracy(self) -> float | None:
        """Correctly predicted labelled tokens / all labelled tokens; None if `validation` was not run."""
        found = self.evaluations.get("validation", {}).get("accuracy")
        return found and found["value"]

    def summary(self) -> str:
        """The main numbers and the paths of the files, for a terminal."""
        head = ("run", f"{self.data['run']}, step {self.step:,}")
        rows = [head, *self.lines, ("folder", str(self.directory)), ("report", str(self.report))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    __repr__ = summary


def evaluate(
    run_dir: epath.PathLike,
    *,
    step: int | str | None = None,
    only: Sequence[str | EvaluatorConfig] | None = None,
    batches: int | None = None,
    stream: int | None = None,
    tasks: Any = None,
    lengths: int | Sequence[int] | None = None,
    pairs: int | Sequence[int] | None = None,
    examples: int | None = None,
    task: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    progress: bool = True,
) -> Results:
    """Evaluates a checkpoint and writes a new folder: RUN/evals/step_N, then step_N-2, step_N-3, ...

    The folder has results.json (all numbers), results.csv (the same, flat), a PNG per plot, and report.html, which is
    self-contained. On several devices the work is split by the run's mesh settings.

    Args:
      run_dir: a run folder, trained on any hardware.
      step: None = the newest checkpoint, "best" = the one with the lowest validation loss, or a number.
      only: names of evaluators, or evaluators with settings; None runs all that apply and are not optional.
      batches: validation batches of `scoring.batch_rows` rows; None scores up to `scoring.DEFAULT_TOKENS` tokens.
      stream: also run the evaluator `stream` to this many tokens of each document.
      tasks, lengths, pairs, examples, task: if any is given, run the evaluator `tasks` instead of all: names of
        generated tasks or tasks with settings (None: the run's own), row lengths, numbers of pairs, rows per setting,
        and values of other fields, each one or several ({"num_updates": (0, 4)}).
      data: fields of the data set to replace, {"path": "elsewhere/books"} for a run away from its data.
      progress: show a progress bar on stderr. Warnings go there in any case.

    Raises:
      UserError: no such run, step, data or evaluator, an evaluator that does not apply to the run, a damaged
        checkpoint, or a model whose loss is not a number.
    """
    run = runs.open_run(run_dir, data)
    if batches is not None and batches < 1:
        raise UserError(f"batches={batches} must be at least 1 (or left out for the default).")
    chosen = choose(run.experiment, only, stream, config_of(tasks, lengths, pairs, examples, task))  # raises early
    mesh = sharding.evaluation_mesh(run.experiment.parallel)
    model, number = run.load(step, mesh=mesh)
    header = _header(run, number, chosen)
    for warning in header["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    with sharding.use_mesh(mesh):
        found = _run(chosen, Context(run, model, number, mesh=mesh, batches=batches), progress)
    header["evaluations"] = {name: _plain(evaluation.values, name) for name, evaluation in found.items()}
    lines = [(name, str(value)) for evaluation in found.values() for name, value in evaluation.summary]
    results = Results(new_folder(run.directory / "evals", number), header, lines)
    _write(results, found)
    return results


def _run(chosen: list[EvaluatorConfig], context: Context, progress: bool) -> dict[str, Evaluation]:
    """Runs the evaluators in order, with one progress bar."""
    from tqdm import tqdm

    found: dict[str, Evaluation] = {}
    with tqdm(total=0, unit="batch", disable=None if progress else True, file=sys.stderr) as bar:  # None: no terminal
        context.bar = bar
        for i, config in enumerate(chosen, 1):
            bar.set_description(f"{config.registered_name} ({i}/{len(chosen)})")
            found[config.registered_name] = config.run(context)
    names = [figure.name for evaluation in found.values() for figure in evaluation.figures]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two figures of this evaluation are named {name!r}; give one another name.")
    return found


def _write(results: Results, found: dict[str, Evaluation]) -> None:
    """Writes all files of an evaluation, results.json last: if it exists, the folder is complete."""
    from engrax.evals import report

    for evaluation in found.values():
        for name, text in evaluation.files.items():
            write_atomically(results.directory / name, text)
        for figure in evaluation.figures:
            if figure.png is not None:
                (results.directory / f"{figure.name}.png").write_bytes(figure.png)
    write_atomically(results.directory / "results.csv", _csv(results.data))
    write_atomically(results.report, report.render(results.data, found))
    text = json.dumps(results.data, indent=2, allow_nan=False) + "\n"
    write_atomically(results.directory / "results.json", text)


def choose(
    experiment: Experiment,
    only: Sequence[str | EvaluatorConfig] | None,
    stream: int | None = None,
    tasks: TasksConfig | None = None,
) -> list[EvaluatorConfig]:
    """The evaluators to run, in the order of the report; with `tasks` only those that are named.

    Raises UserError for an unknown name, and for a named evaluator that does not apply.
    """
    named = {}
    for item in only or ():
        config = item if isinstance(item, EvaluatorConfig) else EVALUATORS[item]()
        named[config.registered_name] = config
    if stream is not None:
        named["stream"] = EVALUATORS["stream"](length=stream)
    if tasks is not None:
        named["tasks"] = tasks
    for config in named.values():
        if reason := config.unavailable(experiment):
            raise UserError(reason)
    chosen = dict(named)
    if only is None and tasks is None:
        for name, cls in EVALUATORS.items():
            if name not in named and not cls.optional and not cls().unavailable(experiment):
                chosen[name] = cls()
    if not chosen:
        raise UserError("only= names no evaluator; leave it out to run all that apply.")
    return sorted(chosen.values(), key=lambda config: (config.order, config.registered_name))


def new_folder(parent: epath.Path, step: int) -> epath.Path:
    """Creates and returns step_N or, if it exists, the first free of step_N-2, step_N-3, ..."""
    parent.mkdir(parents=True, exist_ok=True)
    for name in itertools.chain([f"step_{step}"], (f"step_{step}-{i}" for i in itertools.count(2))):
        if not (parent / name).exists():
            try:
                (parent / name).mkdir()
            except FileExistsError:  # another evaluation was faster
                continue
            return parent / name


def _header(run: runs.Run, step: int, chosen: list[EvaluatorConfig]) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    e, trained, here = run.experiment, run.environment, runs.describe_environment(run.experiment)
    splits = e.data.splits()
    warnings = e.data.warnings()
    if trained.get("data_digest") and trained["data_digest"] != here["data_digest"]:
        warnings.append(
            "the data is not what this run was trained on (its digest differs): validation may hold text that the "
            "model was trained on, and the n-gram baselines count other text than that."
        )
    elif not trained.get("data_digest"):
        warnings.append(
            "environment.json of the run holds no data digest, so nothing says that this is the data of the training."
        )
    return {
        "format_version": FORMAT_VERSION,
        "run": run.directory.name,
        "step": step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": here["commit"],
        "trained_commit": trained.get("commit"),
        "data_digest": here["data_digest"],
        "trained_data_digest": trained.get("data_digest"),
        "seeds": {"experiment": e.seed} | ({"data": e.data.seed} if hasattr(e.data, "seed") else {}),
        "device": here["device"],
        "devices": here["devices"],
        "trained_device": trained.get("device"),
        "versions": here["versions"],
        "splits": None if splits is None else _plain(dataclasses.asdict(splits), "splits"),
        "warnings": warnings,
        "config": experiments.to_dict(e),
        "evaluators": {c.registered_name: _plain(dataclasses.asdict(c), c.registered_name) for c in chosen},
    }


def _plain(value: Any, name: str) -> Any:
    """The value as JSON: arrays become lists, NaN and infinities null. Raises UserError for other types."""
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{name}.{i}") for i, v in enumerate(value)]
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist(), name)
    if not isinstance(value, (str, int, float, bool, type(None))):
        raise UserError(f"{name} is a {type(value).__name__}, which results.json cannot hold; use numbers and texts.")
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _csv(data: dict[str, Any]) -> str:
    """One line per number: the evaluator and its dotted name there, and the value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "value"))
    writer.writerow(("step", data["step"]))
    writer.writerows(_numbers(data["evaluations"], ""))
    return text.getvalue()


def _numbers(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (int, float)):
        yield name, value
