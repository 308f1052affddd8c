"""The frontier: what every mixer recalls with a state of several sizes, all else equal, and how fast it is.

    frontier = setting("mqar", preset="quick")
    found = run(frontier, "runs/frontier_mqar_quick", processes=2, minutes=60)

Every cell is a language model of one mixer at one size (`engrax.layers.sizing`). It is trained at every learning rate
of the grid with seed 0, then at the best rate with seeds 1, 2, ..., which alone are judged. The trials are a sweep's
(`engrax.evals.sweep`), so an interrupted frontier continues.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from engrax.data import MQAR
from engrax.data.config import DATASETS
from engrax.data.task import TaskConfig
from engrax.errors import UserError
from engrax.evals import sweep, verdicts
from engrax.evals.comparison import RATE, Row
from engrax.evals.sweep import Score, Trial
from engrax.evals.verdicts import Interval, Verdict
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.sizing import OneSize, sized
from engrax.models import LanguageModelConfig
from engrax.registry import did_you_mean
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig, cost, metrics
from engrax.train import runs as run_folders

HEADS, CONV_WIDTH, LAYERS = 2, 4, 2  # of every model
BASELINE = "linear_attention"  # of the verdicts: neither gates nor a delta rule


@dataclasses.dataclass(frozen=True)
class Preset:
    """A frontier's settings but for the task and the mixers."""

    task: TaskConfig  # where no other is named
    dim: int  # model width
    steps: int
    batch_size: int  # rows
    sizes: tuple[int, ...]  # bytes of a layer's state
    learning_rates: tuple[float, ...]
    seeds: int  # judged, at the best rate
    mixers: tuple[str, ...] | None = None  # None = all; a user's own mixers are always among them


PRESETS = {
    "quick": Preset(
        task=MQAR(seq_len=64, num_pairs=12, vocab_size=64),
        dim=32,
        steps=1000,
        batch_size=32,
        sizes=(1024, 4096, 16384),
        learning_rates=(3e-3, 1e-2, 3e-2),
        seeds=1,
        mixers=(
            "attention",
            "linear_attention",
            "gla",
            "mamba2",
            "gsa",
            "based",
            "deltanet",
            "gated_deltanet",
            "kda",
            "titans",
        ),
    ),
    "full": Preset(
        task=MQAR(seq_len=128, num_pairs=16, vocab_size=64),
        dim=64,
        steps=3300,
        batch_size=16,
        sizes=(2048, 4096, 8192, 16384, 32768),
        learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
        seeds=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class Frontier:
    """Which mixers are trained at which sizes of state; `setting` builds one from a preset.

    Raises UserError for unknown mixers, fewer than three learning rates, or no judged seed.
    """

    experiment: Experiment  # of all cells, whose model then has the cell's mixer
    mixers: tuple[str, ...]
    sizes: tuple[int, ...]  # bytes of a layer's state
    learning_rates: tuple[float, ...]
    seeds: int = verdicts.LEAST_SEEDS

    def __post_init__(self):
        for name in self.mixers:
            MIXERS[name]  # noqa: B018, raises for an unknown name
        for what, values, least in (("mixers", self.mixers, 1), ("sizes", self.sizes, 1)):
            if len(set(values)) < max(least, len(values)):
                raise UserError(f"{what}={','.join(map(str, values))}: give at least one, each once.")
        if min(self.sizes) < 1:
            raise UserError(f"sizes={self.sizes} must be at least 1 byte.")
        if len(set(self.learning_rates)) < 3 or self.seeds < 1:
            raise UserError(
                f"learning_rates={self.learning_rates} and seeds={self.seeds}: a frontier has at least three rates and "
                "one judged seed."
            )


class Cell(NamedTuple):
    """One mixer at one size."""

    mixer: str
    size: str  # asked for: "4096 bytes" of a layer, or "whole row"
    experiment: Experiment
    state_bytes: int  # of the model for one sequence, all layers
    parameters: int

    @property
    def name(self) -> str:
        """The cell's folder in the sweep."""
        return f"{self.mixer}/{self.size.replace(' ', '_')}"

    def trial(self, rate: float, seed: int) -> Trial:
        """One run of the cell."""
        return Trial(f"{self.name}/lr_{rate:g}_seed_{seed}", self.experiment, {RATE: rate, "seed": seed})


@dataclasses.dataclass(frozen=True)
class Point:
    """A cell's results."""

    cell: Cell
    learning_rate: float  # the best of the grid
    at_edge: bool  # it is at an end of the grid: a wider grid might be better
    grid: dict[float, float]  # learning rate -> accuracy with seed 0, nan where it diverged
    accuracy: Interval  # of the judged seeds
    seeds: tuple[float, ...]  # accuracy of each judged seed, nan where it diverged
    tokens_per_second: float  # training, the median over the judged runs' logs
    best: bool = False  # no point with as few bytes of state recalls more
    verdict: Verdict | None = None  # against the baseline at this size, None where there is none


@dataclasses.dataclass(frozen=True)
class Found:
    """The points of a frontier, and why others are missing."""

    points: tuple[Point, ...]
    left_out: dict[str, str]  # mixer, or mixer at a size -> why it has no cell
    missing: dict[str, str]  # cell -> why it has no point yet


def setting(task: str = "mqar", mixers: Sequence[str] | None = None, preset: str = "quick") -> Frontier:
    """The frontier of a preset for a generated task and, where named, other mixers.

    Raises UserError for an unknown name of a preset, a task or a mixer.
    """
    if preset not in PRESETS:
        raise UserError(f"unknown preset {preset!r}{did_you_mean(preset, PRESETS)} (known: {', '.join(PRESETS)}).")
    chosen = PRESETS[preset]
    data = chosen.task if task == chosen.task.registered_name else _task(task)
    own = [name for name, cls in MIXERS.items() if not cls.__module__.startswith("engrax.")]
    names = mixers or [*(chosen.mixers or MIXERS), *own]
    experiment = Experiment(
        model=LanguageModelConfig(vocab_size=data.vocab_size, dim=chosen.dim, repeat=LAYERS, mlp_hidden=0),
        data=data,
        steps=chosen.steps,
        batch_size=chosen.batch_size,
        optimizer=AdamWConfig(weight_decay=0.01, schedule=CosineConfig(warmup_steps=chosen.steps // 10)),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=0),
        log=LogConfig(every=50),
    )
    return Frontier(experiment, tuple(dict.fromkeys(names)), chosen.sizes, chosen.learning_rates, chosen.seeds)


def _task(name: str) -> TaskConfig:
    """A generated task by its name, with its default settings."""
    tasks = [known for known, cls in DATASETS.items() if issubclass(cls, TaskConfig)]
    if name not in tasks:
        raise UserError(f"unknown task {name!r}{did_you_mean(name, tasks)} (known: {', '.join(tasks)}).")
    return DATASETS[name]()


def cells(frontier: Frontier) -> tuple[list[Cell], dict[str, str]]:
    """The cells, and for mixers and sizes that have none the reason in one sentence."""
    found, left_out = [], {}
    for name in frontier.mixers:
        try:
            plain = comparable(MIXERS[name](), frontier.experiment.model.dim)
            model = _with_mixer(frontier.experiment, plain).model
        except (TypeError, UserError) as error:
            left_out[name] = f"its default settings do not fit: {error}"
            continue
        if leak := model.exempt_from.get("causality"):
            left_out[name] = f"it is not causal ({leak})"
            continue
        own, why = _of_mixer(frontier, name, plain)
        found += own
        left_out |= {f"{name} at {size}": reason for size, reason in why.items()} if own else {}
        if not own:
            left_out[name] = next(iter(why.values()))
    return found, left_out


def _of_mixer(frontier: Frontier, name: str, plain: MixerConfig) -> tuple[list[Cell], dict[str, str]]:
    """The cells of one mixer, and why it has none at other sizes."""
    found, why = [], {}
    dim, tokens = frontier.experiment.model.dim, frontier.experiment.data.seq_len
    for size in frontier.sizes:
        try:
            mixer = sized(plain, dim, size)
        except OneSize:
            return [_cell(frontier.experiment, name, "only size", plain)], {}
        except UserError as error:
            why[f"{size} bytes"] = str(error)
            continue
        if getattr(mixer, "window", None) is not None and hasattr(mixer, "capacity") and mixer.window >= tokens:
            why[f"{size} bytes"] = f"its window of {mixer.window} tokens holds the whole row"
            continue
        found.append(_cell(frontier.experiment, name, f"{size} bytes", mixer))
    if getattr(plain, "window", 0) is None and hasattr(plain, "capacity"):  # a cache of all tokens
        mixer = dataclasses.replace(plain, capacity=tokens)
        found.append(_cell(frontier.experiment, name, "whole row", mixer))
    return found, why


def _cell(experiment: Experiment, name: str, size: str, mixer: MixerConfig) -> Cell:
    experiment = _with_mixer(experiment, mixer)
    costs = cost.costs(experiment)
    return Cell(name, size, experiment, costs["state_bytes_per_sequence"]["total"], costs["parameters"]["total"])


def _with_mixer(experiment: Experiment, mixer: MixerConfig) -> Experiment:
    model = dataclasses.replace(experiment.model, mixers=(mixer,), vocab_size=experiment.data.vocab_size)
    return dataclasses.replace(experiment, model=model)


def comparable(config: MixerConfig, dim: int) -> MixerConfig:
    """The settings with the heads, the short convolution, no output gate and, where it does not grow with the state,
    the width of a head that all have; mixers inside it likewise."""
    shared = {"heads": HEADS, "conv_width": CONV_WIDTH, "output_gate": False, "head_dim": dim // HEADS}
    larger, changes = config.scaled(2.0), {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, MixerConfig):
            changes[field.name] = comparable(value, dim)
        elif field.name in shared and getattr(larger, field.name) == value:
            changes[field.name] = shared[field.name]
    return dataclasses.replace(config, **changes)


def run(
    frontier: Frontier,
    folder: epath.PathLike,
    *,
    processes: int = 1,
    minutes: float | None = None,
    progress: bool = True,
) -> Found:
    """Trains and scores the trials that are missing in `folder`, as far as the minutes reach.

    Raises UserError if no mixer has a cell, or for what `engrax.evals.sweep.run` refuses.
    """
    table, left_out = cells(frontier)
    if not table:
        raise UserError("no mixer is left: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    started = time.monotonic()
    options: dict[str, Any] = dict(processes=processes, progress=progress)
    seeds = range(1, frontier.seeds + 1)
    grid = [cell.trial(rate, 0) for cell in table for rate in frontier.learning_rates]
    outcome = sweep.run(grid, folder, minutes=minutes, later=len(table) * len(seeds), **options)
    scores, missing = dict(outcome.scores), dict(outcome.missing)
    best = {cell.name: rate for cell in table if (rate := _best(cell, frontier.learning_rates, scores)) is not None}
    judged = [cell.trial(best[cell.name], seed) for cell in table if cell.name in best for seed in seeds]
    left = None if minutes is None else max(0.0, minutes - (time.monotonic() - started) / 60)
    outcome = sweep.run(judged, folder, minutes=left, **options)
    scores, missing = scores | outcome.scores, missing | outcome.missing
    reasons, points = {}, []
    for cell in table:
        why = _why_missing(cell, best.get(cell.name), frontier, scores, missing)
        if why is not None:
            reasons[cell.name] = why
        else:
            points.append(_point(cell, best[cell.name], frontier, scores, run_folders.folder(folder)))
    return Found(tuple(_judge(frontier, points, scores)), left_out, reasons)


def _best(cell: Cell, rates: Sequence[float], scores: dict[str, Score]) -> float | None:
    """The learning rate with the highest accuracy; None if one is missing or all diverged."""
    names = {rate: cell.trial(rate, 0).name for rate in rates}
    if not all(name in scores for name in names.values()):
        return None
    sound = [rate for rate, name in names.items() if scores[name].sums is not None]
    return max(sound, key=lambda rate: scores[names[rate]].mean, default=None)


def _why_missing(
    cell: Cell, rate: float | None, frontier: Frontier, scores: dict[str, Score], missing: dict[str, str]
) -> str | None:
    """Why the cell has no point; None if it has one."""
    wanted = [cell.trial(r, 0).name for r in frontier.learning_rates]
    wanted += [] if rate is None else _judged(cell, rate, frontier)
    for name in wanted:
        if name in missing:
            return missing[name]
    if rate is None:
        return "it diverged at every learning rate of the grid"
    if all(scores[name].sums is None for name in _judged(cell, rate, frontier)):
        return f"it diverged with every judged seed at its best learning rate {rate:g}"
    return None


def _judged(cell: Cell, rate: float, frontier: Frontier) -> list[str]:
    return [cell.trial(rate, seed).name for seed in range(1, frontier.seeds + 1)]


def _point(cell: Cell, rate: float, frontier: Frontier, scores: dict[str, Score], folder: epath.Path) -> Point:
    """The cell's point, whose interval and verdict follow when all are known."""
    rates = frontier.learning_rates
    judged = [cell.trial(rate, seed) for seed in range(1, frontier.seeds + 1)]
    speeds = [row["tokens_per_second"] for t in judged for row in metrics.read(folder / t.path) if _has_speed(row)]
    return Point(
        cell=cell,
        learning_rate=rate,
        at_edge=rate in (min(rates), max(rates)),
        grid={r: scores[cell.trial(r, 0).name].mean for r in rates},
        accuracy=Interval(math.nan, math.nan, math.nan),
        seeds=tuple(scores[trial.name].mean for trial in judged),
        tokens_per_second=float(np.median(speeds)) if speeds else math.nan,
    )


def _has_speed(row: dict[str, Any]) -> bool:
    return isinstance(row.get("tokens_per_second"), float)


def _judge(frontier: Frontier, points: list[Point], scores: dict[str, Score]) -> list[Point]:
    """The points with their intervals, with the best at their bytes marked and, with enough seeds, with verdicts."""
    if not points:
        return []
    rows = {}
    for p in points:
        judged = tuple(scores[name] for name in _judged(p.cell, p.learning_rate, frontier))
        rows[p.cell.name] = Row(p.cell.name, p.learning_rate, p.grid, judged, {})
    drawn = verdicts.Bootstrap(list(rows.values()))
    whole = {name for name, row in rows.items() if all(score.sums is not None for score in row.scores)}
    pairs = []
    if frontier.seeds >= verdicts.LEAST_SEEDS:
        bases = {p.cell.size: p.cell.name for p in points if p.cell.mixer == BASELINE}
        pairs = [(p.cell.name, bases[p.cell.size]) for p in points if p.cell.size in bases]
        pairs = [pair for pair in pairs if pair[0] != pair[1] and whole.issuperset(pair)]
    says = dict(zip((name for name, _ in pairs), verdicts.holm(drawn, pairs, higher_is_better=True)))
    found = []
    for p in points:
        plain = drawn.score(p.cell.name)
        interval = Interval(plain.value, max(plain.low, 0.0), min(plain.high, 1.0))
        rivals = [float(np.nanmean(q.seeds)) for q in points if q.cell.state_bytes <= p.cell.state_bytes]
        best = float(np.nanmean(p.seeds)) >= max(rivals)
        found.append(dataclasses.replace(p, accuracy=interval, best=best, verdict=says.get(p.cell.name)))
    return found
