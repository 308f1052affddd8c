"""The plot of a sweep: the score against each field in `across`, a line or a colour per value of another field."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from engrax.evals import plots

MOST_PANELS, MOST_SERIES = 6, 8


class Point(NamedTuple):
    """A setting in the plot."""

    values: dict[str, Any]
    score: float  # nan: no seed has a score
    low: float  # of the seeds
    high: float
    best: bool


def draw(points: Sequence[Point], across: Sequence[str], unit: str, higher_is_better: bool) -> bytes:
    """A panel per field in `across`. Where a line would have several settings at one place, it shows the best."""
    across = list(across)[:MOST_PANELS]
    varied = [field for field in points[0].values if len({str(point.values[field]) for point in points}) > 1]
    others = [field for field in varied if field not in across]
    by = others[0] if others else None
    hidden = others[1:] if len(across) == 1 else []
    values = list(dict.fromkeys(point.values[by] for point in points)) if by else [None]
    if len(values) > MOST_SERIES:  # more than the colours that can be told apart
        by, hidden, values = None, others, [None]
    title = f"{unit.capitalize()} by {', '.join(across)}" + (f"; the best of {', '.join(hidden)}" if hidden else "")
    columns = min(3, len(across))
    rows = math.ceil(len(across) / columns)
    with plots.canvas(title, rows=rows, columns=columns, height=3.4, width=7.4 if columns == 1 else 8.6) as drawn:
        for axis, field in zip(drawn.axes.flat, across):
            place = _scale(axis, field, [point.values[field] for point in points])
            for value, colour in zip(values, plots.SERIES):
                shown = [point for point in points if by is None or point.values[by] == value]
                if hidden or (by is None and len(across) == 1):
                    shown = _best_at_each_place(shown, field, higher_is_better)
                _series(axis, sorted(shown, key=lambda point: place(point.values[field])), place, field, colour,
                        label=None if by is None else f"{by.rpartition('.')[2]} {value}",
                        line=len(across) == 1 and len(shown) <= 12)  # fmt: skip
            axis.set_xlabel(field)
        for axis in drawn.axes[:, 0]:
            axis.set_ylabel(unit)
        for axis in drawn.axes.flat[len(across) :]:
            axis.set_visible(False)
        if by is not None or any(point.best for point in points):
            drawn.axes[0, 0].legend(fontsize=8.5)
    return drawn.png


def _series(axis: Any, shown: Sequence[Point], place: Any, field: str, colour: str, *, label: str | None, line: bool):
    """One line or cloud; what has no score is a cross at the bottom, the best setting a ring."""
    scored = [point for point in shown if not math.isnan(point.score)]
    x = [place(point.values[field]) for point in scored]
    axis.plot(x, [point.score for point in scored], "o-" if line else "o", color=colour, markersize=4.5, label=label)
    for at, point in zip(x, scored):
        axis.plot([at, at], [point.low, point.high], color=colour, linewidth=1.2, alpha=0.7)
        if point.best:
            axis.plot([at], [point.score], "o", markersize=11, markerfacecolor="none", markeredgecolor="#111827",
                      markeredgewidth=1.3, label="best")  # fmt: skip
    for point in shown:
        if math.isnan(point.score):
            axis.plot([place(point.values[field])], [0.03], "x", color=colour, transform=axis.get_xaxis_transform())


def _best_at_each_place(points: Sequence[Point], field: str, higher_is_better: bool) -> list[Point]:
    """For every value of the field the best of the points there."""
    found: dict[Any, Point] = {}
    worst = -math.inf if higher_is_better else math.inf
    key = lambda point: worst if math.isnan(point.score) else point.score  # noqa: E731
    choose = max if higher_is_better else min
    for point in points:
        value = point.values[field]
        found[value] = choose(found.get(value, point), point, key=key)
    return list(found.values())


def _scale(axis: Any, field: str, values: Sequence[Any]) -> Any:
    """Sets the horizontal axis and returns the place of a value: logarithmic over a wide range, ranks for words."""
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        if min(values) > 0 and max(values) >= 4 * min(values):
            axis.set_xscale("log")
        distinct = sorted(set(values))
        if len(distinct) <= 8:
            axis.set_xticks(distinct, [f"{value:g}" for value in distinct])
            axis.minorticks_off()
        return lambda value: value
    words = list(dict.fromkeys(map(str, values)))
    axis.set_xticks(range(len(words)), words)
    return lambda value: words.index(str(value))
