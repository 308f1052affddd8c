"""Needle maps: the score by depth in the context and by length, and the drop in the middle."""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from engrax.data.text_task import TextTask
from engrax.evals import plots
from engrax.evals.context import Context
from engrax.evals.evaluator import Figure, Table
from engrax.evals.statistics import Estimate, half_width
from engrax.evals.task_cells import Cell
from engrax.evals.task_grid import LENGTH, Grid, Values

BINS = 10  # of the depth, where it is drawn


def of(grid: Grid, cells: dict[Values, Cell]) -> dict[str, Any] | None:
    """The map of a task whose answers have a place in the context, with the first values of its other fields:
    {"depths", "lengths", "scores" [depths][lengths], "examples", "mid_sequence_drop" by length}; else None.

    The depths are the grid's, if it varies them, else BINS bins of those that the examples have.
    """
    given = "depth" in grid.varied
    fixed = {name: values[0] for name, values in grid.varied.items() if name not in (LENGTH, "depth")}
    chosen = {key: cell for key, cell in cells.items() if fixed.items() <= grid.values(key).items()}
    depths, lengths, scores, counts, drops = [], [], {}, {}, {}
    for key, cell in chosen.items():
        task = grid.cells[key]
        if not isinstance(task, TextTask):
            return None
        place, score = task.depths(len(cell.hits)), np.divide(cell.hits, cell.trials)
        if np.isnan(place).any():
            return None
        length = grid.values(key)[LENGTH]
        rows = (
            np.full(len(place), grid.values(key)["depth"]) if given else np.minimum(place * BINS, BINS - 1).astype(int)
        )
        for row in np.unique(rows):
            scores[row, length], counts[row, length] = score[rows == row].mean(), int((rows == row).sum())
        drops.setdefault(length, []).append((place, score))
        lengths.append(length)
        depths += rows.tolist()
    lengths, depths = sorted(set(lengths)), sorted(set(depths)) if given else range(BINS)
    table = {
        "depths": [f"{d:g} %" if given else f"{100 * d // BINS} to {100 * (d + 1) // BINS} %" for d in depths],
        "lengths": lengths,
        "scores": [[scores.get((d, n), math.nan) for n in lengths] for d in depths],
        "examples": [[counts.get((d, n), 0) for n in lengths] for d in depths],
    }
    found = {n: mid_sequence_drop(*map(np.concatenate, zip(*parts))) for n, parts in drops.items()}
    return table | {"mid_sequence_drop": {str(n): drop and drop.to_dict() for n, drop in found.items()}}


def mid_sequence_drop(depths: Float[np.ndarray, " N"], scores: Float[np.ndarray, " N"]) -> Estimate | None:
    """The mean of the scores in the first and the last third of the context, minus that in the middle third, with its
    95 % interval over rows; None if a third has fewer than two rows."""
    thirds = [scores[np.minimum(depths * 3, 2).astype(int) == i] for i in range(3)]
    if min(map(len, thirds)) < 2:
        return None
    first, middle, last = (float(third.mean()) for third in thirds)
    value = (first + last) / 2 - middle
    parts = [weight**2 * third.var(ddof=1) / len(third) for weight, third in zip((0.5, 1, 0.5), thirds)]
    half = half_width(len(scores)) * math.sqrt(sum(parts))
    return Estimate(value, value - half, value + half)


def figure(context: Context, grid: Grid, values: dict[str, Any]) -> Figure:
    """The map as a plot and a table."""
    name = grid.name.replace("_", " ")
    heading = f"{name}: score by depth and length"
    panels = {"": np.array(values["scores"])}
    png = heat_map(context.title(heading), values["depths"], values["lengths"], panels, context.experiment.data.seq_len)
    rows = [
        (depth, *("" if math.isnan(score) else f"{score:.2f} ({n})" for score, n in zip(*of_depth)))
        for depth, *of_depth in zip(values["depths"], values["scores"], values["examples"])
    ]
    drops = [(n, d) for n, d in values["mid_sequence_drop"].items() if d]
    words = "; ".join(f"{int(n):,} tokens {d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" for n, d in drops)
    caption = (
        "Rows: the place of what is asked for in the context. Columns: tokens of the row; those right of the line are "
        "longer than the rows of the training. In the table, the number of examples is in brackets."
    )
    if words:
        caption += f" Drop in the middle (outer thirds minus the middle third, 95 % interval over rows): {words}."
    table = Table(("depth", *(f"{n:,}" for n in values["lengths"])), rows)
    return Figure(f"{grid.name}_map", heading, caption, png, table)


def heat_map(
    title: str,
    depths: list[str],
    lengths: list[int],
    panels: dict[str, Float[np.ndarray, "depths lengths"]],
    trained: int | None = None,
) -> bytes:
    """One map per panel {name: scores}, on one scale from 0 to 1; lengths beyond the `trained` one are right of a line.
    Fields without an example are empty."""
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    with plots.canvas(title, rows=down, columns=across, height=0.9 + 0.26 * len(depths), width=8.6) as drawn:
        for i, (axis, (name, scores)) in enumerate(zip(drawn.axes.flat, panels.items())):
            image = axis.imshow(scores, cmap="viridis", aspect="auto", vmin=0, vmax=1)
            axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            axis.set_yticks(range(len(depths)), depths if i % across == 0 else [])
            axis.set(xlabel="tokens of a row", ylabel="depth" if i % across == 0 else "")
            axis.set_title(name, fontsize=9.5)
            axis.grid(visible=False)
            axis.tick_params(length=0, labelsize=8.5)
            _write(axis, scores)
            if trained is not None and lengths[0] <= trained < lengths[-1]:
                axis.axvline(sum(n <= trained for n in lengths) - 0.5, color=plots.ORANGE, linewidth=2)
        for axis in drawn.axes.flat[len(panels) :]:
            axis.set_visible(False)
        drawn.figure.colorbar(image, ax=drawn.axes, label="score", fraction=0.04)
    return drawn.png


def _write(axis: Any, scores: Float[np.ndarray, "depths lengths"]) -> None:
    for (row, column), score in np.ndenumerate(scores):
        if np.isfinite(score):
            colour = "white" if score < 0.6 else "black"
            axis.text(column, row, f"{score:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
