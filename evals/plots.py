"""The plots of an evaluation, each a function from numbers to the bytes of a PNG. matplotlib loads on the first one.

Every plot names its run and step and has a unit on each axis. All its numbers are in results.json or metrics.jsonl.
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#8e5ba6", "#6b7280"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, "#b8860b", "#56b4e9", "#cc79a7", "#404040")
MUTED = (ORANGE, PURPLE, GREEN, *SERIES[4:])  # lines beside the model's, in turn
COLOURS = {"model": BLUE, "muted": ORANGE, "baseline": GREY, "reference": GREY}
VERDICTS = {None: BLUE, "better": GREEN, "worse": ORANGE, "inconclusive": GREY, "no verdict": GREY}
STYLE = {
    "figure.dpi": 144,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
}


class Canvas:
    """A figure under way; `png` holds its bytes once the block that opened it ends."""

    def __init__(self, figure: Any, axes: np.ndarray):
        self.figure, self.axes, self.png = figure, axes, b""


@contextlib.contextmanager
def canvas(title: str, *, rows: int = 1, columns: int = 1, height: float = 3.6, width: float = 7.4) -> Iterator[Canvas]:
    """Opens a figure of rows x columns axes; `height` in inches is that of one row. No window and no global state."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * rows + 0.35), layout="constrained")
        FigureCanvasAgg(figure)
        drawn = Canvas(figure, figure.subplots(rows, columns, squeeze=False))
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        yield drawn
        stream = io.BytesIO()
        figure.savefig(stream, format="png", metadata={"Software": None})
        drawn.png = stream.getvalue()


def bars(title: str, label: str, entries: Sequence[dict[str, Any]], *, limit: float | None = None) -> bytes:
    """Horizontal bars, the first entry on top: {"name", "kind", "value", "low", "high"}."""
    with canvas(title, height=0.45 + 0.42 * len(entries)) as drawn:
        axis = drawn.axes[0, 0]
        places = np.arange(len(entries))[::-1]
        values = [entry["value"] for entry in entries]
        axis.barh(places, values, height=0.62, color=[COLOURS[entry["kind"]] for entry in entries])
        top = limit or 1.13 * max([entry.get("high") or entry["value"] for entry in entries] + [1e-9])
        for place, entry in zip(places, entries):
            end = entry["value"]
            if entry.get("high") is not None:
                axis.plot([entry["low"], entry["high"]], [place, place], color="#111827", linewidth=1.4)
                end = entry["high"]
            axis.text(end + 0.008 * top, place, _number(entry["value"]), va="center", fontsize=9, color="#111827")
        axis.set_yticks(places, [entry["name"] for entry in entries])
        axis.set_xlim(0, top)
        axis.set_xlabel(label)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0, labelcolor="#111827")
    return drawn.png


def intervals(title: str, label: str, entries: Sequence[dict[str, Any]]) -> bytes:
    """Points with their intervals, the first entry on top and its interval drawn through all of them as a band:
    {"name", "verdict" on it against the first, or None, "value", "low", "high"}."""
    with canvas(title, height=0.6 + 0.34 * len(entries)) as drawn:
        axis = drawn.axes[0, 0]
        axis.axvspan(entries[0]["low"], entries[0]["high"], color=BLUE, alpha=0.12, lw=0)
        for place, entry in zip(range(len(entries), 0, -1), entries):
            colour = VERDICTS[entry["verdict"]]
            axis.plot([entry["low"], entry["high"]], [place, place], color=colour, linewidth=2)
            axis.plot([entry["value"]], [place], "o", color=colour, markersize=5)
            note = f"{_number(entry['value'])}  {entry['verdict'] or ''}".rstrip()
            axis.annotate(note, (1, place), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=colour,
                          xytext=(4, 0), textcoords="offset points")  # fmt: skip
        axis.set_yticks(range(len(entries), 0, -1), [entry["name"] for entry in entries])
        axis.set_ylim(0.4, len(entries) + 0.6)
        axis.set_xlabel(label)
        axis.tick_params(axis="y", length=0, labelcolor="#111827")
    return drawn.png


def curves(
    title: str,
    axis_labels: tuple[str, str],
    lines: Sequence[dict[str, Any]],
    *,
    log_x: bool,
    levels: Sequence[tuple[str, float]] = (),
    marks: Sequence[tuple[str, float]] = (),
    y_range: tuple[float, float] | None = None,
) -> bytes:
    """Curves over position bins: {"name", "kind", "bins"}; `levels` are horizontal lines such as chance, `marks`
    vertical ones such as a length."""
    with canvas(title) as drawn:
        axis = drawn.axes[0, 0]
        for i, line in enumerate(lines):
            bins = line["bins"]
            middle = [_middle(b, log_x) for b in bins]
            colour = COLOURS[line["kind"]] if line["kind"] != "muted" else MUTED[(i - 1) % len(MUTED)]
            style = ":" if line["kind"] == "baseline" else "-"
            axis.plot(
                middle, [b["value"] for b in bins], style, color=colour, label=line["name"], marker="o", markersize=2.6
            )
            if i == 0 and all(b["low"] is not None for b in bins):
                axis.fill_between(
                    middle, [b["low"] for b in bins], [b["high"] for b in bins], color=colour, alpha=0.16, lw=0
                )
        for name, level in levels:
            axis.axhline(level, color=GREY, linestyle="--", linewidth=1.1)
            axis.annotate(f"{name}\n{_number(level)}", (1, level), xycoords=("axes fraction", "data"), va="center",
                          xytext=(4, 0), textcoords="offset points", fontsize=8.5, color=GREY)  # fmt: skip
        for name, place in marks:
            axis.axvline(place, color=GREY, linestyle="--", linewidth=1.1)
            axis.annotate(name, (place, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8.5, color=GREY,
                          xytext=(4, -2), textcoords="offset points")  # fmt: skip
        if log_x:
            ends = [b[end] for line in lines for b in line["bins"] for end in ("from", "to")]
            _log_axis(axis, min(ends), max(ends))
        if y_range:
            axis.set_ylim(*y_range)
        axis.set_xlabel(axis_labels[0])
        axis.set_ylabel(axis_labels[1])
        axis.legend(loc="best", fontsize=9)
    return drawn.png


def lines(
    title: str,
    axis_labels: tuple[str, str],
    entries: Sequence[dict[str, Any]],
    *,
    ticks: Sequence[Any],
    marks: Sequence[tuple[str, float]] = (),
) -> bytes:
    """Measurements at a few values of a setting: {"name", "kind", "x", "value", "low", "high"}, each a list but the
    first two. Kinds are model, part (dashed) and reference (grey). The axis has the `ticks`, in powers of two where
    they span a factor of four, and texts at equal distances; `marks` are vertical lines."""
    with canvas(title) as drawn:
        axis = drawn.axes[0, 0]
        texts = not all(isinstance(tick, (int, float)) for tick in ticks)
        places = {tick: i if texts else tick for i, tick in enumerate(ticks)}
        if not texts and min(ticks) > 0 and max(ticks) >= 4 * min(ticks):
            _log_axis(axis, min(ticks), max(ticks))
        colours = iter(SERIES * len(entries))
        grey = [entry["value"][-1] for entry in entries if entry["kind"] == "reference"]
        for entry in entries:
            x, reference = [places[value] for value in entry["x"]], entry["kind"] == "reference"
            colour = GREY if reference else next(colours)
            style = {"model": "o-", "part": "o--", "reference": ":"}[entry["kind"]]
            if reference:
                axis.plot(x, entry["value"], style, color=colour, linewidth=1.2)
                end = entry["value"][-1]
                below = any(0 < other - end < 0.05 for other in grey)  # the text of a line just above would cover it
                axis.annotate(entry["name"], (x[-1], end), ha="right", va="top" if below else "bottom", fontsize=8.5,
                              color=GREY, xytext=(-2, -2 if below else 2), textcoords="offset points")  # fmt: skip
                continue
            axis.plot(x, entry["value"], style, color=colour, label=entry["name"], markersize=4)
            if None not in entry["low"]:
                axis.fill_between(x, entry["low"], entry["high"], color=colour, alpha=0.14, lw=0)
        for name, place in marks:
            axis.axvline(place, color=GREY, linestyle="--", linewidth=1.1)
            axis.annotate(name, (place, 1), xycoords=("data", "axes fraction"), va="bottom", ha="center", fontsize=8.5,
                          color=GREY, xytext=(0, 1), textcoords="offset points")  # fmt: skip
        axis.set_xticks(list(places.values()), [f"{t:,}" if isinstance(t, int) else str(t) for t in ticks])
        axis.set_ylim(-0.03, 1.09)
        axis.set(xlabel=axis_labels[0], ylabel=axis_labels[1])
        axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5)
    return drawn.png


def training(title: str, panels: Sequence[dict[str, Any]], step: int) -> bytes:
    """Panels side by side over training steps: {"label", "series": [{"name", "x", "y", "style"}], "zero"}."""
    with canvas(title, columns=len(panels), height=3.1, width=8.6) as drawn:
        for axis, panel in zip(drawn.axes[0], panels):
            for i, series in enumerate(panel["series"]):
                colour = (BLUE, ORANGE)[i % 2]
                if series["style"] == "points":
                    axis.plot(series["x"], series["y"], "o-", color=colour, markersize=3.5, label=series["name"])
                else:
                    axis.plot(series["x"], series["y"], color=colour, alpha=0.3, linewidth=1)
                    axis.plot(series["x"], smooth(series["y"]), color=colour, label=series["name"])
            axis.set_xlabel("training step")
            axis.set_title(panel["label"])
            if panel["zero"]:
                axis.set_ylim(bottom=0)
            if axis.get_ylim()[1] >= 1000:
                axis.yaxis.set_major_formatter("{x:,.0f}")
            if len(panel["series"]) > 1:
                axis.legend(fontsize=9)
            _whole_numbers(axis.xaxis)
            _mark(axis, step, panel["series"])
    return drawn.png


def small_multiples(title: str, x_label: str, panels: dict[str, dict[str, tuple]], *, step: int | None = None) -> bytes:
    """One panel per diagnostic, {name: {series: (x, y)}}, three in a row, with one legend for all."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with canvas(title, rows=rows, columns=columns, height=2.05, width=8.6) as drawn:
        names = list(dict.fromkeys(series for panel in panels.values() for series in panel))
        for axis, (name, panel) in zip(drawn.axes.flat, panels.items()):
            for series, (x, y) in panel.items():
                colour = SERIES[names.index(series) % len(SERIES)]
                axis.plot(x, y, "o-" if len(x) < 60 else "-", color=colour, markersize=3.2, label=series)
            axis.set_title(name, fontsize=9.5)
            axis.margins(y=0.15)
            axis.ticklabel_format(axis="y", useOffset=False)
            _whole_numbers(axis.xaxis)
            if step is not None:
                _mark(axis, step, [{"x": x} for x, _ in panel.values()])
        for axis in drawn.axes.flat[len(panels) :]:
            axis.set_visible(False)
        drawn.figure.supxlabel(x_label, fontsize=9.5)
        if len(names) > 1:
            handles = drawn.axes[0, 0].get_legend_handles_labels()
            drawn.figure.legend(*handles, loc="outside upper right", ncols=min(len(names), 6), fontsize=9)
    return drawn.png


def by_layer(title: str, panels: dict[str, dict[str, float]]) -> bytes:
    """One panel per diagnostic with a bar per layer, {name: {layer: value}}."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    with canvas(title, rows=rows, columns=columns, height=1.75, width=8.6) as drawn:
        for axis, (name, panel) in zip(drawn.axes.flat, panels.items()):
            places = np.arange(len(panel))
            axis.bar(places, list(panel.values()), width=min(0.62, 0.2 * len(panel) + 0.1), color=BLUE)
            if len(panel) <= 6:
                for place, value in zip(places, panel.values()):
                    axis.annotate(
                        _number(value),
                        (place, value),
                        ha="center",
                        xytext=(0, 2),
                        textcoords="offset points",
                        fontsize=8,
                    )
            every = max(1, len(panel) // 8)
            axis.set_xticks(places[::every], list(panel)[::every], fontsize=8.5)
            axis.set_xlim(-0.75, len(panel) - 0.25)
            axis.margins(y=0.22)
            axis.set_title(name, fontsize=9.5)
            axis.grid(axis="x", visible=False)
            axis.tick_params(axis="x", length=0)
        for axis in drawn.axes.flat[len(panels) :]:
            axis.set_visible(False)
    return drawn.png


def smooth(values: Sequence[float]) -> np.ndarray:
    """A centred running mean over about a twentieth of the points, as long as the input."""
    values = np.asarray(values, float)
    half = max(1, len(values) // 40)
    sums = np.cumsum(np.concatenate([[0.0], values]))
    places = np.arange(len(values))
    first, last = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _middle(b: dict[str, Any], log_x: bool) -> float:
    """The place of a bin on the axis; positions count from 1 there, so that the first fits a logarithmic axis."""
    first, last = b["from"] + 1, b["to"]
    return math.sqrt(first * last) if log_x else (first + last) / 2


def _log_axis(axis: Any, first: int, last: int) -> None:
    from matplotlib.ticker import NullLocator

    axis.set_xscale("log", base=2)
    ticks = [2**i for i in range(int(math.log2(max(first, 1))), int(math.log2(max(last, 2))) + 1)]
    axis.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axis.xaxis.set_minor_locator(NullLocator())


def _whole_numbers(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(integer=True, nbins=5))


def _mark(axis: Any, step: int, series: Sequence[dict[str, Any]]) -> None:
    """A line at the evaluated step, unless it is where the training ended."""
    last = max((x for s in series for x in s["x"]), default=step)
    if step < last:
        axis.axvline(step, color=GREY, linestyle="--", linewidth=1.1)


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def heat_maps(title: str, x_label: str, y_label: str, panels: dict[str, np.ndarray]) -> bytes:
    """One panel per table [rows, columns], {name: values}, each with its scale."""
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    with canvas(title, rows=rows, columns=columns, height=3.2, width=8.6) as drawn:
        for axis, (name, values) in zip(drawn.axes.flat, panels.items()):
            image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=0)
            drawn.figure.colorbar(image, ax=axis)
            axis.set(xlabel=x_label, ylabel=y_label)
            axis.set_title(name, fontsize=9.5)
            axis.grid(visible=False)
            _whole_numbers(axis.xaxis)
            _whole_numbers(axis.yaxis)
        for axis in drawn.axes.flat[len(panels) :]:
            axis.set_visible(False)
    return drawn.png


def tables(title: str, rows: Sequence[str], panels: dict[str, dict[str, Any]]) -> bytes:
    """One heat map per panel with the same rows, {name: {"values" [rows, columns], "columns", "axis", "top"}}; scales
    go from 0 to `top`, and up to eight columns have their numbers in them."""
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    with canvas(title, rows=down, columns=across, height=0.65 + 0.23 * len(rows), width=8.6) as drawn:
        for i, (axis, (name, panel)) in enumerate(zip(drawn.axes.flat, panels.items())):
            values, columns = panel["values"], panel["columns"]
            top = panel["top"] or 1.0
            axis.imshow(values, cmap="viridis", aspect="auto", vmin=0, vmax=top)
            every = max(1, len(columns) // 8)
            axis.set_xticks(range(0, len(columns), every), columns[::every])
            axis.set_yticks(range(len(rows)), rows if i % across == 0 else [])
            axis.axhline(0.5, color="white", linewidth=2.5)
            axis.set_xlabel(panel["axis"])
            axis.set_title(name, fontsize=9.5)
            axis.grid(visible=False)
            axis.tick_params(length=0, labelsize=8.5)
            if len(columns) <= 8:
                _write_numbers(axis, values, 0.0, top)
            else:
                drawn.figure.colorbar(axis.images[0], ax=axis)
        for axis in drawn.axes.flat[len(panels) :]:
            axis.set_visible(False)
    return drawn.png


def grids(title: str, x_label: str, panels: dict[str, tuple[Sequence[str], np.ndarray]]) -> bytes:
    """One heat map per panel, {name: (rows, values [rows, entries])}, each with its scale from 0 or the least value;
    few entries have their numbers in them."""
    across = min(2, len(panels))
    down = math.ceil(len(panels) / across)
    deepest = max(len(rows) for rows, _ in panels.values())
    with canvas(title, rows=down, columns=across, height=0.85 + 0.3 * deepest, width=8.6) as drawn:
        for axis, (name, (rows, values)) in zip(drawn.axes.flat, panels.items()):
            low, high = min(np.nanmin(values, initial=0), 0), np.nanmax(values, initial=0) or 1.0
            image = axis.imshow(values, cmap="viridis", aspect="auto", vmin=low, vmax=high)
            axis.set_yticks(range(len(rows)), rows)
            axis.set(xlabel=x_label)
            axis.set_title(name, fontsize=9.5)
            axis.grid(visible=False)
            axis.tick_params(length=0, labelsize=8.5)
            _whole_numbers(axis.xaxis)
            if values.shape[1] * max(len(_short(value)) for value in values.flat) <= 40:  # characters that fit
                _write_numbers(axis, values, low, high)
            else:
                drawn.figure.colorbar(image, ax=axis)
        for axis in drawn.axes.flat[len(panels) :]:
            axis.set_visible(False)
    return drawn.png


def _write_numbers(axis: Any, values: np.ndarray, low: float, high: float) -> None:
    """Writes the numbers into a heat map's cells, white on the dark part of the scale."""
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            colour = "white" if value - low < 0.6 * (high - low) else "black"
            axis.text(column, row, _short(value), ha="center", va="center", fontsize=7.5, color=colour)


def _short(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= abs(value) < 100 or value == 0 else f"{value:.1e}"
