"""The plot of a frontier: recall against bytes of state and against speed."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from engrax.evals.plots import GREY, SERIES, canvas

MARKS = ("o", "s", "^", "D", "v", "P")  # with the lines, in turn, where there are more mixers than colours
LINES = ("-", "--", ":", "-.")


def draw(title: str, chance: float, points: Sequence[dict[str, Any]]) -> bytes:
    """Recall against bytes of state and, if known, against tokens per second, a line per mixer.

    Points are {"mixer", "state_bytes", "accuracy", "low", "high", "tokens_per_second", "best"}. The grey line is the
    best so far, from few bytes up and from high speeds down; the points best at their bytes are filled.
    """
    names = list(dict.fromkeys(point["mixer"] for point in points))
    columns = math.ceil(len(names) / 18)
    panels = {"state_bytes": "bytes of state", "tokens_per_second": "tokens/s"}
    panels = {key: label for key, label in panels.items() if any(point[key] for point in points)}
    with canvas(title, columns=len(panels), height=4.6, width=9.2 + 1.5 * columns) as drawn:
        for axis, (key, label) in zip(drawn.axes[0], panels.items()):
            _best_so_far(axis, [p for p in points if p[key]], key, rising=key == "state_bytes")
            for i, name in enumerate(names):
                own = sorted((p for p in points if p["mixer"] == name and p[key]), key=lambda p: p["state_bytes"])
                x, turn = [p[key] for p in own], i // len(SERIES)
                look = dict(color=SERIES[i % len(SERIES)], marker=MARKS[turn % len(MARKS)], markersize=4.5)
                width, line = (1.3, LINES[turn % len(LINES)]) if key == "state_bytes" else (0.4, "-")
                y = [p["accuracy"] for p in own]
                axis.plot(x, y, line, label=name, linewidth=width, alpha=0.85, markerfacecolor="white", **look)
                best = [p for p in own if p["best"]]
                axis.plot([p[key] for p in best], [p["accuracy"] for p in best], linestyle="none", **look)
                if key == "state_bytes":
                    axis.vlines(x, [p["low"] for p in own], [p["high"] for p in own], color=look["color"], lw=1)
            axis.axhline(chance, color=GREY, linestyle=":", linewidth=1.1)
            axis.set_xscale("log", base=2 if key == "state_bytes" else 10)
            axis.set_xlabel(label)
            axis.set_ylim(-0.02, 1.04)
        if len(panels) > 1:
            _thousands(drawn.axes[0, 1].xaxis)
        drawn.axes[0, 0].xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g} KiB" if x >= 1024 else f"{x:g} B")
        drawn.axes[0, 0].set_ylabel("recall (accuracy)")
        handles = drawn.axes[0, 0].get_legend_handles_labels()
        drawn.figure.legend(*handles, loc="outside right center", ncols=columns, fontsize=8.5, handlelength=2.6)
    return drawn.png


def _best_so_far(axis: Any, points: Sequence[dict[str, Any]], key: str, *, rising: bool) -> None:
    """A wide grey line of the highest accuracy among the points up to each x, or from each x on."""
    ordered = sorted(points, key=lambda p: p[key] if rising else -p[key])
    best = np.maximum.accumulate([p["accuracy"] for p in ordered] or [0.0])
    axis.plot(
        [p[key] for p in ordered], best[: len(ordered)], color="#d1d5db", linewidth=5, drawstyle="steps-post", zorder=0
    )


def _thousands(axis: Any) -> None:
    """Speeds on a logarithmic axis: 5k, 20k."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axis.set_minor_formatter(NullFormatter())
