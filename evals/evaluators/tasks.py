"""Accuracy on generated memory tasks, by length and by difficulty."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from engrax.data.continual import Continual
from engrax.data.task import TaskConfig
from engrax.data.text_task import TextTask
from engrax.errors import UserError
from engrax.evals import continual, needle_map, plots, task_grid
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.statistics import Estimate
from engrax.evals.task_cells import Cell, Cells
from engrax.evals.task_grid import LENGTH, Grid, Values
from engrax.registry import register
from engrax.train.checkpoint import Checkpoints
from engrax.train.cost import size


@register("tasks")
@dataclasses.dataclass(frozen=True)
class TasksConfig(EvaluatorConfig):
    """Generated memory tasks: accuracy by length and by difficulty, and the cost; runs only if it is named."""

    tasks: tuple[str | TaskConfig, ...] = ()  # names, or tasks with settings; () = the run's own
    lengths: tuple[int, ...] = ()  # tokens per row; () = the training's, twice and four times that
    fields: dict[str, Values] = dataclasses.field(default_factory=dict)  # values of other fields of the tasks
    examples: int = 500  # rows of each setting

    order: ClassVar[int] = 5
    optional: ClassVar[bool] = True

    def __post_init__(self):
        for name, numbers in (("lengths", self.lengths), ("examples", (self.examples,))):
            if not all(type(number) is int and 1 <= number < 1 << 31 for number in numbers):
                raise UserError(f"{name}={getattr(self, name)} must be whole numbers from 1.")
        for name, values in self.fields.items():
            if not values:
                raise UserError(f"the field {name} of the tasks has no value; give one or several.")

    def unavailable(self, experiment: Any) -> str | None:
        """The tasks and lengths must fit each other and the model."""
        try:
            self.grids(experiment)
        except UserError as error:
            return str(error)
        return None

    def grids(self, experiment: Any) -> list[Grid]:
        """The settings that are tried."""
        return task_grid.grids(experiment, self.tasks, self.lengths, self.fields)

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        grids = self.grids(context.experiment)
        found, reused = _measured(Cells(context, context.model, context.step, self.examples), grids)
        values = {
            "trained_on": context.experiment.data.registered_name,
            "trained_length": context.experiment.data.seq_len,
            "reused_cells": reused,
            "tasks": {grid.name: _values(grid, cells) for grid, cells in zip(grids, found)},
        }
        figures, summary = [], []
        for grid, cells in zip(grids, found):
            gap, why = _stability_gap(context, grid, self.examples)
            if grid.name == Continual.registered_name:
                values["tasks"][grid.name] |= {"stability_gap": gap, "no_stability_gap": why}
            figures += _figures(context, grid, cells, gap, why)
            if (found_map := needle_map.of(grid, cells)) is not None:
                values["tasks"][grid.name]["map"] = found_map
                figures.append(needle_map.figure(context, grid, found_map))
            summary += [(_setting(context, grid, key), _line(cell)) for key, cell in cells.items()]
            summary += [(f"  {name}", text) for name, text in _metrics(gap)]
        if reused:
            summary.append(("settings measured by an earlier evaluation", reused))
        return Evaluation(values, figures, summary, {"tasks.csv": _csv(context, grids, found)})


def config_of(
    tasks: str | TaskConfig | Sequence[str | TaskConfig] | None = None,
    lengths: int | Sequence[int] | None = None,
    pairs: int | Sequence[int] | None = None,
    examples: int | None = None,
    fields: dict[str, Any] | None = None,
) -> TasksConfig | None:
    """The evaluator for these arguments, each one value or several; None if all are None or empty."""
    fields = {name: _several(value) for name, value in (fields or {}).items()}
    if pairs is not None:
        fields = {"num_pairs": _several(pairs)} | fields
    if tasks is None and lengths is None and examples is None and not fields:
        return None
    names = tasks.split(",") if isinstance(tasks, str) else _several(tasks)
    names = tuple(name.strip() if isinstance(name, str) else name for name in names)
    given = {} if examples is None else {"examples": examples}
    return TasksConfig(names, _several(lengths), fields, **given)


def _several(value: Any) -> tuple[Any, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple, range)) else (value,)


def _measured(cells: Cells, grids: list[Grid]) -> tuple[list[dict[Values, Cell]], int]:
    """The cells of every grid, and how many of them an earlier evaluation has left."""
    found = [{key: cells.find(task) for key, task in grid.cells.items()} for grid in grids]
    open_cells = [(i, key) for i, of in enumerate(found) for key, cell in of.items() if cell is None]
    context = cells.context
    tick = context.expect(sum(cells.calls(grids[i].cells[key]) for i, key in open_cells))
    for number, (i, key) in enumerate(open_cells, 1):
        if context.bar is not None:
            place = f"{number}/{len(open_cells)}"
            context.bar.set_description(f"{grids[i].name}, {key[0]:,} tokens, step {cells.step:,} ({place})")
        found[i][key] = cells.measure(grids[i].cells[key], tick)
    return found, sum(map(len, found)) - len(open_cells)


def _stability_gap(context: Context, grid: Grid, examples: int) -> tuple[dict[str, Any] | None, str | None]:
    """(the metrics of a run on a continual stream, from the checkpoints that it has kept, why there are none)."""
    stream = context.experiment.data
    if grid.name != Continual.registered_name:
        return None, None
    if grid.cells.get((stream.seq_len,)) != stream:
        return None, "the stability gap is measured on a run's own stream, at the training's length."
    checkpoints = Checkpoints(context.run.directory)
    try:
        steps = [step for step in checkpoints.steps() if step <= context.step]
    finally:
        checkpoints.close()
    try:
        steps, ends = continual.checkpoints_of(stream, context.experiment.batch_size, steps)
    except UserError as error:
        return None, str(error)
    rows = []
    for step in steps:
        model = context.model if step == context.step else context.run.load(step, mesh=context.mesh)[0]
        own = Grid(grid.name, {}, {(stream.seq_len,): stream}, {})
        (found,), _ = _measured(Cells(context, model, step, examples), [own])
        rows.append(found[stream.seq_len,])
    hits, trials = (np.array([getattr(cell, name) for cell in rows]) for name in ("hits", "trials"))
    return continual.stability_gap_of_rows(hits, trials, np.array(ends)) | {"steps": steps}, None


# Numbers.


def _values(grid: Grid, cells: dict[Values, Cell]) -> dict[str, Any]:
    """The cells of a task for results.json."""
    return {
        "axes": next(iter(grid.cells.values())).axes,
        "whole_rows": next(iter(grid.cells.values())).whole_rows,
        "varied": {name: list(values) for name, values in grid.varied.items()},
        "cells": [{"values": grid.values(key)} | _numbers(cell) for key, cell in cells.items()],
        "does_not_fit": [{"values": grid.values(key), "reason": why} for key, why in grid.refused.items()],
    }


def _numbers(cell: Cell) -> dict[str, Any]:
    numbers = dataclasses.asdict(cell)
    for name in ("hits", "trials"):
        del numbers[name]
    numbers["state_bytes_by_mixer"] = dict(cell.state_bytes_by_mixer)
    numbers["slices"] = {s.name: dataclasses.asdict(s.accuracy) | {"labels": s.labels} for s in cell.slices}
    diagnostics: dict[str, Any] = {}
    for d in cell.diagnostics:
        diagnostics.setdefault(d.name, {})[d.block] = {"median": d.median, "p99": d.p99}
    return numbers | {"diagnostics": diagnostics}


def _csv(context: Context, grids: list[Grid], found: list[dict[Values, Cell]]) -> str:
    """One line per cell: the task, its settings and the main numbers."""
    fields = list(dict.fromkeys(name for grid in grids for name in grid.varied))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    measured = ("accuracy", "low", "high", "chance", "oracle", "examples", "labels", "tokens_per_second")
    writer.writerow(("task", "step", *fields, "trained_length", *measured, "state_bytes", "peak_bytes"))
    for grid, cells in zip(grids, found):
        for key, cell in cells.items():
            values = grid.values(key)
            own = (cell.accuracy.value, cell.accuracy.low, cell.accuracy.high)
            own += tuple(getattr(cell, name) for name in (*measured[3:], "state_bytes", "peak_bytes"))
            settings = (values.get(name, "") for name in fields)
            writer.writerow((grid.name, context.step, *settings, context.experiment.data.seq_len, *own))
    return text.getvalue()


# Words and plots.


def _setting(context: Context, grid: Grid, key: Values) -> str:
    length, *others = key
    trained = " (trained)" if length == context.experiment.data.seq_len else ""
    return ", ".join([f"{grid.name}, {length:,} tokens{trained}", *_named(list(grid.varied)[1:], others)])


def _named(fields: Sequence[str], values: Sequence[Any]) -> list[str]:
    return [f"{name.replace('_', ' ')} {value}" for name, value in zip(fields, values)]


def _line(cell: Cell) -> str:
    return (
        f"{_estimate(cell.accuracy)} (chance {cell.chance:.4f}, oracle {cell.oracle:.0%}), "
        f"{cell.tokens_per_second:,.0f} tokens/s, state {size(cell.state_bytes)}"
    )


def _metrics(gap: dict[str, Any] | None) -> list[tuple[str, str]]:
    """The stability gap as (name, value)."""
    return [
        (name.replace("_", " "), _estimate(Estimate(**found))) for name, found in (gap or {}).items() if name != "steps"
    ]


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return ""
    ends = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.value:.3f}{ends}"


def _figures(
    context: Context, grid: Grid, cells: dict[Values, Cell], gap: dict[str, Any] | None, why: str | None
) -> list[Figure]:
    name = grid.name.replace("_", " ")
    several = [field for field, values in grid.varied.items() if len(values) > 1] or [LENGTH]
    figures = []
    for field in several:
        what = "length" if field == LENGTH else field.replace("_", " ")
        heading = f"{name}: accuracy by {what}"
        png = _plot(context, grid, cells, field, heading) if len(grid.varied[field]) > 1 else None
        first = field == several[0]
        caption = _caption(context, grid, cells, gap, why) if first else "The band is the 95 % interval over rows."
        table = _table(context, grid, cells) if first else None
        figures.append(Figure(f"{grid.name}_by_{what.replace(' ', '_')}", heading, caption, png, table, folded=False))
    return figures + _diagnostics(context, grid, cells)


def _caption(
    context: Context, grid: Grid, cells: dict[Values, Cell], gap: dict[str, Any] | None, why: str | None
) -> str:
    examples, task = next(iter(cells.values())).examples, next(iter(grid.cells.values()))
    counted = "A row is right only if all its labels are." if task.whole_rows else "Accuracy of the labelled positions."
    if isinstance(task, TextTask):
        counted = task.rule
    sentences = [
        f"{examples:,} rows per setting; the run was trained on rows of {context.experiment.data.seq_len:,} tokens.",
        counted,
        "Intervals are 95 % intervals over rows. The state is what one sequence holds after the row, caches up to its "
        "length; the peak is what the compiled pass over a batch holds, parameters included.",
    ]
    if any(cell.nats is None for cell in cells.values()):
        sentences.append("Some outputs are NOT NUMBERS; they count as wrong.")
    if gap:
        metrics = ", ".join(f"{name} {text}" for name, text in _metrics(gap))
        sentences.append(f"Over the checkpoints of steps {', '.join(map(str, gap['steps']))}: {metrics}.")
    return " ".join([*sentences, *([why[0].upper() + why[1:]] if why else [])])


def _plot(context: Context, grid: Grid, cells: dict[Values, Cell], field: str, heading: str) -> bytes:
    """Accuracy by the values of a field, a line for each combination of the others; parts and references if there is
    only one."""
    place = list(grid.varied).index(field)
    others = [name for name in grid.varied if name != field and len(grid.varied[name]) > 1]
    groups: dict[tuple, dict[Any, Cell]] = {}
    for key, cell in cells.items():
        values = grid.values(key)
        groups.setdefault(tuple(values[name] for name in others), {})[key[place]] = cell
    entries = []
    for other, line in groups.items():
        label = "length" if others == [LENGTH] else ""
        label = f"{other[0]:,} tokens" if label else ", ".join(_named(others, other)) or "model"
        entries.append({"name": label, "kind": "model"} | _points(line, lambda cell: cell.accuracy))
    (line, *rest) = groups.values()
    if not rest:
        for name in _parts(line):
            entries.append({"name": name, "kind": "part"} | _points(line, lambda cell, name=name: cell.part(name)))
    for name in ("chance_in_context", "chance", "oracle"):
        if all(
            getattr(of[x], name) in (None, getattr(line[x], name)) for of in groups.values() for x in of if x in line
        ):
            at = {x: getattr(cell, name) for x, cell in line.items() if getattr(cell, name) is not None}
            reference = {"name": name.replace("_", " "), "kind": "reference", "x": list(at), "value": list(at.values())}
            entries += [reference] if at else []
    own, ticks = context.experiment.data, grid.varied[field]
    same = field == LENGTH or own.registered_name == grid.name
    trained = getattr(own, field, None) if same else None
    marks = [(f"trained on {trained:,}", trained)] if isinstance(trained, (int, float)) else []
    label = "tokens of a row" if field == LENGTH else field.replace("_", " ")
    return plots.lines(context.title(heading), (label, "accuracy"), entries, ticks=ticks, marks=marks)


def _points(line: dict[Any, Cell], of: Any) -> dict[str, list]:
    found = {x: of(cell) for x, cell in line.items() if of(cell) is not None}
    ends = {name: [getattr(estimate, name) for estimate in found.values()] for name in ("value", "low", "high")}
    return {"x": list(found)} | ends


def _parts(cells: dict[Any, Cell]) -> list[str]:
    """The names of all slices."""
    return list(dict.fromkeys(part.name for cell in cells.values() for part in cell.slices))


def _table(context: Context, grid: Grid, cells: dict[Values, Cell]) -> Table:
    first, trained = next(iter(cells.values())), context.experiment.data.seq_len
    parts = _parts(cells)
    inside = first.chance_in_context is not None
    head = ("tokens of a row", *(name.replace("_", " ") for name in list(grid.varied)[1:]), "accuracy", *parts)
    head += ("chance", *(["in context"] if inside else []), "oracle", "tokens/s", "state", "peak memory")
    rows = []
    for key, cell in cells.items():
        settings = (f"{key[0]:,}{' (trained)' if key[0] == trained else ''}", *key[1:])
        numbers = (_estimate(cell.accuracy), *(_estimate(cell.part(part)) for part in parts), f"{cell.chance:.4f}")
        numbers += (f"{cell.chance_in_context:.4f}",) if inside else ()
        costs = (f"{cell.oracle:.0%}", f"{cell.tokens_per_second:,.0f}", size(cell.state_bytes), size(cell.peak_bytes))
        rows.append((*settings, *numbers, *costs))
    for key in grid.refused:
        rows.append((f"{key[0]:,}", *key[1:], "does not fit", *[""] * (len(head) - len(key) - 1)))
    return Table(head, rows)


def _diagnostics(context: Context, grid: Grid, cells: dict[Values, Cell]) -> list[Figure]:
    """What the memories report, by length, with the first values of the other fields."""
    others = next(iter(cells))[1:]
    lengths = {key[0]: cell for key, cell in cells.items() if key[1:] == others}
    panels: dict[str, dict[str, tuple[list, list]]] = {}
    for length, cell in lengths.items():
        for d in cell.diagnostics:
            if d.median is not None:
                x, y = panels.setdefault(d.name, {}).setdefault(d.block, ([], []))
                x.append(length)
                y.append(d.median)
    if not panels:
        return []
    heading = f"{grid.name.replace('_', ' ')}: memory by length"
    png = plots.small_multiples(context.title(heading), "tokens of a row", panels) if len(lengths) > 1 else None
    rows = [
        (name, block, *(_number(y[x.index(length)]) if length in x else "not finite" for length in lengths))
        for name, panel in panels.items()
        for block, (x, y) in panel.items()
    ]
    table = Table(("median over rows", "", *(f"{length:,}" for length in lengths)), rows)
    named = ", ".join(_named(list(grid.varied)[1:], others))
    caption = f"What the memories report on the same rows{f', with {named}' if named else ''}."
    return [Figure(f"{grid.name}_memory", heading, caption, png, table)]


def _number(value: float) -> str:
    return f"{value:.4g}"
