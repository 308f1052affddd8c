"""One page for the evaluations of several runs: their main numbers, and for every task and for long documents a plot
with a line or a map for each run."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from engrax.errors import UserError
from engrax.evals import needle_map, plots, report
from engrax.evals.evaluation import Results
from engrax.evals.evaluator import Evaluation, Figure, Table
from engrax.evals.task_grid import LENGTH
from engrax.files import write_atomically
from engrax.train import runs


@dataclasses.dataclass(frozen=True, repr=False)
class SideBySide:
    """A finished page; str() gives the main numbers of the runs."""

    directory: epath.Path
    results: dict[str, Results]  # by the run's name
    table: Table

    @property
    def report(self) -> epath.Path:
        """The page."""
        return self.directory / "side_by_side.html"

    def summary(self) -> str:
        """The main numbers, one line each, and the page."""
        rows = [[str(cell) for cell in row] for row in (self.table.columns, *self.table.rows)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, f"report  {self.report}"])

    __repr__ = summary


def side_by_side(results: Sequence[Results], folder: epath.PathLike) -> SideBySide:
    """Writes side_by_side.html, .csv and a PNG per plot into the folder; raises UserError for fewer than two runs."""
    if len(results) < 2:
        raise UserError("one run has nothing beside it; name two or more.")
    named = dict(zip(_names(results), results))
    directory = runs.folder(folder)
    runs.refuse_file(directory)
    directory.mkdir(parents=True, exist_ok=True)
    table, figures = _table(named), [*_tasks(named), *_lengths(named)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.columns, *table.rows])
    write_atomically(directory / "side_by_side.csv", text.getvalue())
    for figure in figures:
        if figure.png is not None:
            (directory / f"{figure.name}.png").write_bytes(figure.png)
    found = SideBySide(directory, named, table)
    write_atomically(found.report, _page(named, table, figures))
    return found


def _names(results: Sequence[Results]) -> list[str]:
    """The runs' names, with as much of their paths as tells them apart."""
    paths = [os.fspath(result.directory.parent.parent) for result in results]
    names = [result.data["run"] for result in results]
    if len(set(names)) < len(names):
        above = os.path.commonpath([os.path.dirname(path) for path in paths])
        names = [os.path.relpath(path, above) for path in paths]
    if len(set(names)) < len(names):
        raise UserError("a run is named twice; name it once.")
    return names


def _table(named: dict[str, Results]) -> Table:
    """The numbers that the evaluations print, a column for each run."""
    lines = {name: dict(result.lines) for name, result in named.items()}
    rows = list(dict.fromkeys(row for result in named.values() for row, _ in result.lines))
    head = [f"{name}, step {result.step:,}" for name, result in named.items()]
    return Table(["", *head], [[row.strip(), *(lines[name].get(row, "") for name in named)] for row in rows])


def _tasks(named: dict[str, Results]) -> list[Figure]:
    """Score by length and maps of every task, with the first values of its other fields."""
    tasks = {name: result.evaluations.get("tasks", {}).get("tasks", {}) for name, result in named.items()}
    figures = []
    for task in dict.fromkeys(task for of in tasks.values() for task in of):
        heading = f"{task.replace('_', ' ')}: score by length"
        lines, ticks, maps = [], set(), {}
        for name, of in tasks.items():
            cells = of.get(task, {}).get("cells", [])
            others = [{k: v for k, v in cell["values"].items() if k != LENGTH} for cell in cells]
            cells = [cell for cell, other in zip(cells, others) if other == others[0]]
            if not cells:
                continue
            x = [cell["values"][LENGTH] for cell in cells]
            ends = {end: [cell["accuracy"][end] for cell in cells] for end in ("value", "low", "high")}
            lines.append({"name": name, "kind": "model", "x": x} | ends)
            ticks |= set(x)
            if of[task].get("map"):
                maps[name] = of[task]["map"]
        if len(ticks) > 1:
            png = plots.lines(heading, ("tokens of a row", "score"), lines, ticks=sorted(ticks))
            figures.append(Figure(f"{task}_by_length", heading, "The bands are 95 % intervals over rows.", png))
        same = [name for name in maps if maps[name]["lengths"] == next(iter(maps.values()))["lengths"]]
        if same:
            figures.append(_maps(task, {name: maps[name] for name in same}))
    return figures


def _maps(task: str, maps: dict[str, dict[str, Any]]) -> Figure:
    first, heading = next(iter(maps.values())), f"{task.replace('_', ' ')}: score by depth and length"
    panels = {name: np.array(found["scores"], float) for name, found in maps.items()}
    png = needle_map.heat_map(heading, first["depths"], first["lengths"], panels)
    rows = []
    for name, found in maps.items():
        drops = (found["mid_sequence_drop"][str(n)] for n in first["lengths"])
        rows.append(
            (name, *("" if d is None else f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for d in drops))
        )
    table = Table(("drop in the middle", *(f"{n:,} tokens" for n in first["lengths"])), rows)
    return Figure(f"{task}_map", heading, "One map for each run, on one scale.", png, table, folded=False)


def _lengths(named: dict[str, Results]) -> list[Figure]:
    """The loss of the first tokens of long documents."""
    lines = [
        {"name": name, "kind": "muted", "bins": [{"from": p["tokens"] - 1, "to": p["tokens"]} | p for p in points]}
        for name, result in named.items()
        if (points := result.evaluations.get("stream", {}).get("by_length", {}).get("model"))
    ]
    if not lines:
        return []
    labels = ("tokens read of every document", "bits per byte")
    png = plots.curves("Loss by length", labels, [lines[0] | {"kind": "model"}, *lines[1:]], log_x=True)
    return [Figure("loss_by_length", "Loss by length", "The loss of all tokens up to a length.", png)]


def _page(named: dict[str, Results], table: Table, figures: list[Figure]) -> str:
    first = next(iter(named.values())).data
    warnings = [f"{name}: {warning}" for name, result in named.items() for warning in result.data["warnings"]]
    facts = [(name, f"{result.directory}, commit {result.data['commit']}") for name, result in named.items()]
    numbers = Figure("numbers", "Main numbers", "A column for each run.", table=table, folded=False)
    return report.page(
        data={key: first[key] for key in ("data_digest", "device", "date")} | {"warnings": warnings},
        title="Runs side by side",
        subject=", ".join(named),
        commit=(first["commit"] or "unknown")[:12],
        seeds=", ".join(str(result.data["seeds"]["experiment"]) for result in named.values()),
        cards=[],
        parts=report.parts("side_by_side", Evaluation({}, [numbers, *figures])),
        provenance=Table((), facts),
        config=json.dumps({name: result.data["config"] for name, result in named.items()}, indent=2),
    )
