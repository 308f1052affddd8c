"""Claims of papers, tried at a small size: a card's experiments and what they find.

A card has two presets, `quick` and `full`. A preset is a function of a folder that continues what is there: `Compared`
(a comparison and its claims), `Measured` (numbers measured on the judged runs), or a function of its own.
`engrax.evals.claim_report` runs a card and writes its page.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from engrax.errors import UserError
from engrax.evals import plots, scoring, verdicts
from engrax.evals.comparison import Comparison, Judged, grid_then_seeds, trial_of
from engrax.evals.comparison_report import compare, how
from engrax.evals.verdicts import Interval
from engrax.files import read_json, write_atomically
from engrax.train import cost, runs
from engrax.train.experiment import Experiment, replace

LOOK = "a look"  # too few seeds for a verdict
WORDS = {"better": "reproduced", "worse": "contradicted", "inconclusive": "inconclusive"}
MEASURED = "measured.json"  # in the evals/ of a judged run


@dataclasses.dataclass(frozen=True)
class Options:
    """How a preset runs; as for `engrax.evals.sweep.run`."""

    processes: int = 1
    minutes: float | None = None  # no training begins that would end later
    progress: bool = True
    command: str = ""  # that repeats it


@dataclasses.dataclass(frozen=True)
class Finding:
    """One claim and its verdict."""

    claim: str
    found: Interval  # the number that the claim says is positive; nan ends for a look
    verdict: str  # reproduced, contradicted, inconclusive, or LOOK


@dataclasses.dataclass(frozen=True)
class Found:
    """What a preset found."""

    findings: Sequence[Finding]
    text: str  # tables and notes, Markdown
    plots: Mapping[str, bytes]  # PNGs by their titles
    data: Mapping[str, Any]  # every number
    missing: Mapping[str, str] = dataclasses.field(default_factory=dict)  # trials to come, and why


Preset = Callable[[epath.Path, Options], Found]


@dataclasses.dataclass(frozen=True)
class Card:
    """A claim: what the paper says, what is tried here, and the rule of the verdict, written before the first run."""

    paper: str  # source and numbers
    here: str  # the experiment at a small size
    rule: str
    quick: Preset  # at most 2 minutes of two cores: does it run, and which way does it look?
    full: Preset  # at most 90 minutes


@dataclasses.dataclass(frozen=True)
class Compared:
    """A comparison with its claims, and numbers of its judged runs beside the table."""

    comparison: Comparison
    by: Callable[[epath.Path], dict[str, float]] | None = None  # of a run folder
    title: str = ""  # of the table of `by`

    def __call__(self, folder: epath.Path, options: Options) -> Found:
        chosen = dataclasses.asdict(options)
        found = compare(self.comparison, folder, **chosen)
        findings, text = [], [found.markdown]
        data: dict[str, Any] = {"tasks": {task: table.data for task, table in found.tables.items()}}
        for task, part in self.comparison.parts().items():
            if (table := found.tables.get(task)) is None:
                continue
            findings += _claimed(part, table, f"{task}: " if task else "")
            if self.by is not None:
                paths = {
                    line.name: [
                        folder / trial_of(task, line.name, part.experiments[line.name], line.learning_rate, seed).path
                        for seed in range(1, part.seeds + 1)
                    ]
                    for line in table.lines
                }
                by = {name: [measured(self.by, path) for path in each] for name, each in paths.items()}
                data.setdefault("by", {})[task] = by
                text.append(f"\n{self.title}\n\n{_spread(by)}")
        plotted = {task or "The comparison": table.plot for task, table in found.tables.items()}
        return Found(findings, "\n".join(text), plotted, data, found.missing)


def part(comparison: Comparison, names: Sequence[str] = (), *, steps: int, seeds: int = 1, **fields: Any) -> Comparison:
    """The comparison of these experiments (none = all) and their claims, trained for this many steps, with this many
    judged seeds (1 = a look) and fields replaced in all: `batch_size=4`, `data__seq_len=64`."""
    chosen = {name: comparison.experiments[name] for name in names or comparison.experiments}
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    experiments = {name: replace(of_length(experiment, steps), changes) for name, experiment in chosen.items()}
    kept = tuple(claim for claim in comparison.claims if {claim.better, claim.worse} <= chosen.keys())
    return dataclasses.replace(comparison, experiments=experiments, seeds=seeds, claims=kept)


def of_length(experiment: Experiment, steps: int) -> Experiment:
    """The experiment with this many steps and a warmup in proportion."""
    warmup = round(experiment.optimizer.schedule.warmup_steps * steps / experiment.steps)
    return replace(experiment, {"steps": steps, "optimizer.schedule.warmup_steps": warmup})


def _claimed(part: Comparison, table: Any, prefix: str) -> list[Finding]:
    """The claims of a comparison's table; those without enough seeds are looks."""
    judged = {found.claim: found for found in table.claims}
    lines = {line.name: line for line in table.lines}
    sign = 1 if scoring.kind_of(next(iter(part.experiments.values()))) == "task" else -1
    findings = []
    for claim in part.claims:
        text = f"{prefix}{claim.better} above {claim.worse} ({claim.source})"
        if claim in judged:
            value = judged[claim].difference
            ends = (value.low, value.high) if sign > 0 else (-value.high, -value.low)
            findings.append(Finding(text, Interval(sign * value.value, *ends), judged[claim].verdict))
        elif claim.better in lines and claim.worse in lines:
            difference = lines[claim.better].score.value - lines[claim.worse].score.value
            findings.append(_look(text, sign * difference))
    return findings


def _look(claim: str, value: float) -> Finding:
    return Finding(claim, Interval(value, math.nan, math.nan), LOOK)


def measured(measure: Callable[[epath.Path], dict[str, Any]], directory: epath.Path) -> dict[str, Any]:
    """What `measure` finds of a run folder; found once, and kept in the folder's evals/ by the function's name."""
    path, named = directory / "evals" / MEASURED, getattr(measure, "func", measure)
    name = f"{named.__module__}.{named.__qualname__} {getattr(measure, 'keywords', '')}".strip()
    known = read_json(path, "delete it: it can be measured again") if path.exists() else {}
    if name not in known:
        known[name] = measure(directory)
        write_atomically(path, json.dumps(known) + "\n")
    return known[name]


def answers(directory: epath.Path, fields: dict[str, Any] | None = None) -> tuple[scoring.Rows, np.ndarray, Experiment]:
    """(the validation rows of a run on data with these fields, where it is right [N, T], its experiment)."""
    run = runs.open_run(directory, fields)
    model, _ = run.load()
    rows = scoring.validation_rows(run.experiment, None)
    return rows, scoring.Scorer(run.experiment, model).score(rows).right & rows.labelled, run.experiment


@dataclasses.dataclass(frozen=True)
class Contrast:
    """A claim of `Measured`: one measurement is larger than another, each (experiment, name), or than a number."""

    claim: str
    more: tuple[str, str]
    less: tuple[str, str] | float


@dataclasses.dataclass(frozen=True)
class Measured:
    """Experiments that may differ in their data, each judged at its best rate by what `measure` finds of its runs.

    Intervals are Student's t over the judged seeds: of the differences by seed within one experiment, else Welch's.
    Verdicts are corrected for their number after Holm.
    """

    experiments: dict[str, Experiment]
    measure: Callable[[epath.Path], dict[str, float]]  # of a run folder
    contrasts: tuple[Contrast, ...]
    learning_rates: tuple[float, ...]
    seeds: int = 3
    unit: str = "accuracy"

    def __call__(self, folder: epath.Path, options: Options) -> Found:
        keys = {("", name): experiment for name, experiment in self.experiments.items()}
        chosen = dict(processes=options.processes, minutes=options.minutes, progress=options.progress)
        judged = grid_then_seeds(keys, self.learning_rates, self.seeds, folder, **chosen)
        missing = {name: why for (_, name), why in judged.absent.items()}
        if not judged.found:
            name, why = next(iter(missing.items()))
            raise UserError(f"no experiment has all its trials, so there is no table yet; {name!r}: {why}.")
        by, rates = {}, {}
        for (_, name), one in judged.found.items():
            sound = [trial for trial, score in zip(one.trials, one.scores) if score.sums is not None]
            by[name], rates[name] = [measured(self.measure, folder / trial.path) for trial in sound], _rates(one)
        findings = contrasted(self.contrasts, by, self.seeds)
        head = {name: _head(self.experiments[name], one) for (_, name), one in judged.found.items()}
        names = [f"{name}: {measure}" for name, each in by.items() for measure in each[0]]
        values = [[found[measure] for found in each] for each in by.values() for measure in each[0]]
        entries = [
            {"name": name, "kind": "model", "value": float(np.mean(x)), "low": min(x), "high": max(x)}
            for name, x in zip(names, values)
        ]
        plot = plots.bars("Means and ranges over the judged seeds", self.unit, entries)
        note = f"{how(self.learning_rates, self.seeds).capitalize()}. `*`: the best rate ends the grid."
        return Found(
            findings, f"{_spread(by, head)}\n{note}\n", {"Measured": plot}, {"by_seed": by, "rates": rates}, missing
        )


def _rates(one: Judged) -> dict[str, Any]:
    plain = lambda value: None if math.isnan(value) else value  # noqa: E731
    return {"best": one.rate, "grid": {f"{rate:g}": plain(value) for rate, value in one.grid.items()}}


def _head(experiment: Experiment, one: Judged) -> dict[str, str]:
    """The first columns of an experiment's line."""
    costs = cost.costs(experiment)
    state = costs["state_bytes_per_sequence"]
    edge = "*" if one.rate in (min(one.grid), max(one.grid)) else ""
    return {
        "parameters": f"{costs['parameters']['total']:,}",
        "state": "" if state is None else cost.size(state["total"]),
        "learning rate": f"{one.rate:g}{edge}",
    }


def _spread(by: dict[str, list[dict[str, float]]], head: dict[str, dict[str, str]] | None = None) -> str:
    """Mean, lowest and highest of every measurement over the seeds, as a Markdown table."""
    first = next(iter(by.values()))[0]
    columns = [*(next(iter(head.values())) if head else ()), *first]
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    for name, each in by.items():
        values = [[found[measure] for found in each] for measure in first]
        cells = [f"{np.mean(x):.3f}" + (f" [{min(x):.3f}, {max(x):.3f}]" if len(x) > 1 else "") for x in values]
        lines.append([name, *(head[name].values() if head else ()), *cells])
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    several = len(next(iter(by.values()))) > 1
    return table + ("\n\nMean over the judged seeds, with the lowest and the highest.\n" if several else "\n")


def contrasted(
    contrasts: Sequence[Contrast], by: dict[str, list[dict[str, float]]], seeds: int, level: float = verdicts.LEVEL
) -> list[Finding]:
    """The findings of contrasts from the measurements of every seed; looks below verdicts.LEAST_SEEDS seeds."""
    findings: list[Finding] = []
    chances: list[float] = []  # that a difference as clear occurs by chance
    for contrast in contrasts:
        less = () if isinstance(contrast.less, float | int) else (contrast.less,)
        if not all(name in by for name, _ in (contrast.more, *less)):
            continue
        more = np.array([found[contrast.more[1]] for found in by[contrast.more[0]]])
        other = np.array([found[less[0][1]] for found in by[less[0][0]]]) if less else np.full(len(more), contrast.less)
        paired = not less or less[0][0] == contrast.more[0]
        value, chance = t_interval((more - other,) if paired else (more, other))
        if min(len(more), len(other)) < max(verdicts.LEAST_SEEDS, seeds):
            findings.append(_look(contrast.claim, value.value))
        else:
            findings.append(Finding(contrast.claim, value, "inconclusive"))
            chances.append(chance)
    judged = [i for i, finding in enumerate(findings) if finding.verdict != LOOK]
    for rank, k in enumerate(np.argsort(chances)):
        if chances[k] > level / (len(chances) - rank):
            break
        i = judged[k]
        word = "reproduced" if findings[i].found.value > 0 else "contradicted"
        findings[i] = dataclasses.replace(findings[i], verdict=word)
    return findings


def t_interval(samples: Sequence[np.ndarray]) -> tuple[Interval, float]:
    """(mean of the first sample minus that of the second, if there is one, with its 95 % interval by Student's or
    Welch's t; the chance of a difference as large by chance)."""
    from scipy.stats import t

    value = float(samples[0].mean() - (samples[1].mean() if len(samples) > 1 else 0))
    if min(map(len, samples)) < 2:
        return Interval(value, math.nan, math.nan), 1.0
    parts = [x.var(ddof=1) / len(x) for x in samples]
    error = math.sqrt(sum(parts))
    if not error:
        return Interval(value, value, value), 0.0 if value else 1.0
    freedom = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, samples))
    half = float(t.ppf(0.975, freedom)) * error
    return Interval(value, value - half, value + half), float(2 * t.sf(abs(value) / error, freedom))
