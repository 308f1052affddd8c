"""`engrax sweep`: an experiment at every setting of a grid, or at random ones, with one table and one plot.

A setting is a choice of fields. It is trained with one or more seeds; its score is their mean. Trial i of a random
search draws each field from a generator of its own, seeded by i and the field's name, so it is the same after an
interruption, in any process, and whatever the number of trials.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from engrax.errors import UserError
from engrax.evals import scoring, search_plot, sweep
from engrax.evals.comparison_report import head_of
from engrax.evals.trials import Score, Trial, better
from engrax.files import write_atomically
from engrax.train import runs
from engrax.train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole numbers if both are. Raises UserError if it is empty."""

    low: int | float
    high: int | float
    log: bool = False  # uniform in the logarithm

    def __post_init__(self):
        numbers = all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in (self.low, self.high))
        if not numbers or not self.low < self.high or (self.log and self.low <= 0):
            raise UserError(
                f"{self.low}:{self.high}{':log' if self.log else ''} is no range: give LOW:HIGH with two numbers, "
                "LOW below HIGH, and above 0 with :log."
            )

    def draw(self, rng: np.random.Generator) -> int | float:
        """One value; floats have four digits, so that they can be typed again."""
        if self.log:
            value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        elif isinstance(self.low, int) and isinstance(self.high, int):
            return int(rng.integers(self.low, self.high + 1))
        else:
            value = rng.uniform(self.low, self.high)
        if isinstance(self.low, int) and isinstance(self.high, int):
            return round(value)
        return min(max(float(f"{value:.4g}"), float(self.low)), float(self.high))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting and what its trials gave."""

    values: dict[str, Any]  # dotted field -> value
    scores: dict[int, Score]  # by seed, of the trials that ended
    missing: dict[int, str]  # by seed: why the others have no score

    @property
    def means(self) -> list[float]:
        """The seeds' scores, without those that diverged."""
        return [score.mean for score in self.scores.values() if score.sums is not None]

    @property
    def score(self) -> float:
        """The mean over seeds; nan if none has a score."""
        return float(np.mean(self.means)) if self.means else float("nan")

    @property
    def diverged(self) -> int:
        """Seeds that diverged."""
        return len(self.scores) - len(self.means)

    @property
    def whole(self) -> bool:
        """Whether every seed has a score."""
        return not self.missing and not self.diverged


@dataclasses.dataclass(frozen=True, repr=False)
class SweepResult:
    """A sweep's settings, those of a random search from the best to the worst."""

    directory: epath.Path
    settings: list[Setting]
    best: Setting | None  # of those with all seeds; None if there is none
    missing: dict[str, str]  # the trials without a score, and why
    markdown: str

    def __repr__(self) -> str:
        return self.markdown


def search(
    experiment: Experiment,
    folder: epath.PathLike,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    random: Mapping[str, Range | tuple] | None = None,
    trials: int | None = None,
    seeds: int = 1,
    processes: int = 1,
    minutes: float | None = None,
    rerun: Sequence[str] = ("engrax", "train", "CONFIG"),
    command: str = "",
    progress: bool = True,
) -> SweepResult:
    """Trains and scores what is missing in `folder`, and writes sweep.md, sweep.csv, sweep.json and sweep.png there.

    grid: every combination of these values; random: `trials` draws from these ranges (a Range, or its fields as a
    tuple) at every point of the grid. `seeds` counts from the experiment's own seed. `rerun`: the command that the best
    setting's flags are appended to. Raises UserError for a mistake, before any training.
    """
    grid = dict(grid or {})
    ranges = {field: r if isinstance(r, Range) else Range(*r) for field, r in (random or {}).items()}
    chosen = settings_of(grid, ranges, trials)
    if seeds < 1:
        raise UserError(f"seeds={seeds} must be at least 1.")
    numbers = range(experiment.seed, experiment.seed + seeds)
    named = {name_of(values, ranges): values for values in chosen}  # equal draws are one setting
    planned = {
        name: {seed: Trial(f"{name}/seed_{seed}", experiment, values | {"seed": seed}) for seed in numbers}
        for name, values in named.items()
    }
    every = [planned[name][seed] for seed in numbers for name in named]  # one seed of all first
    outcome = sweep.run(every, folder, processes=processes, minutes=minutes, progress=progress)
    settings = [_setting(named[name], by_seed, outcome) for name, by_seed in planned.items()]
    if ranges:
        sign = -1 if scoring.kind_of(experiment) == "task" else 1
        settings.sort(key=lambda setting: math.inf if math.isnan(setting.score) else sign * setting.score)
    best = None
    for setting in settings:
        if setting.whole and (best is None or better(setting.score, best.score, experiment)):
            best = setting
    head = head_of(experiment, command) | {"seeds": list(numbers)}
    again = shlex.join([*rerun, *flags_of(best.values)]) if best else None
    text = _markdown(head, settings, best, again, seeds)
    found = SweepResult(runs.folder(folder), settings, best, outcome.missing, text)
    _write(found, head | {"best": best and best.values, "rerun": again}, list(ranges) or list(grid)[:1])
    return found


def settings_of(
    grid: Mapping[str, Sequence[Any]], ranges: Mapping[str, Range], trials: int | None
) -> list[dict[str, Any]]:
    """The values of every setting. Raises UserError if nothing is swept, or a field twice."""
    if not grid and not ranges:
        raise UserError("nothing is swept: give --grid FIELD=VALUE,VALUE or --random FIELD=LOW:HIGH.")
    if bool(ranges) != (trials is not None) or (trials or 1) < 1:
        raise UserError(f"trials={trials}: a random search needs a number of trials, and a grid has its own.")
    if both := [field for field in (*grid, "seed") if field in ranges] or [field for field in grid if field == "seed"]:
        raise UserError(f"{both[0]} is swept twice: name a field once; seeds are counted by --seeds.")
    if empty := [field for field, values in grid.items() if not len(values)]:
        raise UserError(f"the grid has no value for {empty[0]}.")
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    draws = [
        {field: r.draw(np.random.default_rng([i, *field.encode()])) for field, r in ranges.items()}
        for i in range(trials or 1)
    ]
    return [point | draw for point in points for draw in draws]


def name_of(values: Mapping[str, Any], ranges: Mapping[str, Range] = {}) -> str:
    """The name of a setting's folder."""
    last = [field.rpartition(".")[2] for field in values]
    short = [name if last.count(name) == 1 else field for name, field in zip(last, values)]
    text = ",".join(f"{name}={value}" for name, value in zip(short, values.values()))
    plain = "".join(c if c.isalnum() or c in "=,._+-" else "_" for c in text)
    if plain != text or len(plain) > 120:
        plain = f"{plain[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return plain


def flags_of(values: Mapping[str, Any]) -> list[str]:
    """The command line's flags for these values."""
    flags = []
    for field, value in values.items():
        head, _, last = field.replace("_", "-").rpartition(".")
        name = f"--{head}." if head else "--"
        flags += [f"{name}{'' if value else 'no-'}{last}"] if isinstance(value, bool) else [f"{name}{last}", str(value)]
    return flags


def _setting(values: dict[str, Any], by_seed: dict[int, Trial], outcome: sweep.Outcome) -> Setting:
    names = {seed: trial.name for seed, trial in by_seed.items()}
    scores = {seed: outcome.scores[name] for seed, name in names.items() if name in outcome.scores}
    missing = {seed: outcome.missing[name] for seed, name in names.items() if name in outcome.missing}
    return Setting(values, scores, missing)


def _cells(setting: Setting, seeds: int) -> list[str]:
    means = setting.means
    score = f"{setting.score:.4f}" if means else ("diverged" if setting.diverged else "missing")
    cells = [str(value) for value in setting.values.values()] + [score]
    if seeds > 1:
        cells += [f"{min(means):.4f}" if means else "", f"{max(means):.4f}" if means else ""]
    note = [f"{setting.diverged} diverged"] * bool(setting.diverged) + [f"{len(setting.missing)} missing"] * bool(
        setting.missing
    )
    return [*cells, f"{len(means)} of {seeds}" + (f" ({', '.join(note)})" if note else "")]


def _markdown(
    head: dict[str, Any], settings: list[Setting], best: Setting | None, again: str | None, seeds: int
) -> str:
    spread = ["lowest", "highest"] if seeds > 1 else []
    columns = [*settings[0].values, head["unit"], *spread, "seeds"]
    lines = [columns, ["---"] * len(columns)]
    for setting in settings:
        cells = _cells(setting, seeds)
        lines.append([f"**{cell}**" if setting is best and cell else cell for cell in cells])
    told = [
        f"{head['date']}, {head['device']}, jax {head['versions'].get('jax')}; {head['steps']} steps of "
        f"{head['batch_size']} x {head['seq_len']} tokens unless swept; scores on the validation rows.",
    ]
    if again:
        told.append("The best setting is bold. Its score was chosen for being the best: judge it with other seeds.")
        told.append(f"Train it again: `{again}`")
    if head["command"]:
        told.append(f"Command: `{head['command']}`")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n" + "\n\n".join(told) + "\n"


def _write(found: SweepResult, head: dict[str, Any], across: list[str]) -> None:
    """The files of a sweep; `across`: the fields on the plot's horizontal axes."""
    plain = lambda value: None if isinstance(value, float) and math.isnan(value) else value  # noqa: E731
    rows = [
        {
            "settings": setting.values,
            "score": plain(setting.score),
            "seeds": {seed: plain(score.mean) for seed, score in setting.scores.items()},
            "missing": setting.missing,
            "seconds": sum(score.seconds for score in setting.scores.values()),
        }
        for setting in found.settings
    ]
    found.directory.mkdir(parents=True, exist_ok=True)
    data = head | {"settings": rows}
    write_atomically(found.directory / "sweep.json", json.dumps(data, indent=1) + "\n")
    write_atomically(found.directory / "sweep.md", found.markdown)
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow([*found.settings[0].values, head["unit"], "lowest", "highest", "seeds", "diverged", "seconds"])
    for setting, row in zip(found.settings, rows):
        low_high = [min(setting.means), max(setting.means)] if setting.means else ["", ""]
        score = "" if row["score"] is None else row["score"]
        table.writerow(
            [*setting.values.values(), score, *low_high, len(setting.means), setting.diverged, row["seconds"]]
        )
    write_atomically(found.directory / "sweep.csv", stream.getvalue())
    points = [(s.values, s.score, min(s.means, default=s.score), max(s.means, default=s.score)) for s in found.settings]
    best = found.settings.index(found.best) if found.best else None
    points = [search_plot.Point(*point, best=i == best) for i, point in enumerate(points)]
    higher = head["unit"] == scoring.UNITS["task"]
    (found.directory / "sweep.png").write_bytes(search_plot.draw(points, across, head["unit"], higher))
