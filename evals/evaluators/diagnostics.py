"""Diagnostics reported by the memories."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from engrax.evals import plots
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.words import number
from engrax.registry import register

RUNS_AWAY = 10  # a diagnostic gets a warning if its 99th percentile over rows is this many times its median

Values = dict[str, dict[str, dict[str, Any]]]  # diagnostic -> block -> summary over rows


@register("diagnostics")
@dataclasses.dataclass(frozen=True)
class DiagnosticsConfig(EvaluatorConfig):
    """Diagnostics reported by the memories: gates, norms, surprise, loads, by block, entry and position."""

    order: ClassVar[int] = 50

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        values = summarise(context)
        figures = (_by_block, _by_entry, _by_position, _recall)
        drawn = [figure for draw in figures if (figure := draw(context.title, values)) is not None]
        return Evaluation(values, drawn)


def summarise(context: Context) -> Values:
    """The diagnostics over the rows: {"titans.lr_mean": {"block 1": summary}}.

    A number has {"median", "mean", "p99"} over rows, one of every token {"by_position": [T]}, an array (a value for
    each head, memory or segment) {"values": its mean over rows}. A value for every token and memory is left to the
    evaluator `token_types`.
    """
    tokens = context.diagnosed_rows.tokens.shape
    found: Values = {}
    for name, values in context.diagnostics.items():
        for repeat in range(values.shape[1]):
            layer, summary = values[:, repeat], None
            if layer.ndim == 1:
                summary = {"median": np.median(layer), "mean": np.mean(layer), "p99": np.percentile(layer, 99)}
            elif layer.shape[:2] != tokens:
                summary = {"values": np.mean(layer, axis=0).tolist()}
            elif layer.ndim == 2:
                count = np.maximum(np.isfinite(layer).sum(axis=0), 1)
                summary = {"by_position": (np.nansum(layer, axis=0) / count).tolist()}
            if summary is not None:
                found.setdefault(name, {})[context.block(name, repeat)] = summary
    return found


def _numbers(values: Values) -> dict[str, dict[str, float]]:
    """The diagnostics that are one number per block, medians over rows: {name: {block: value}}."""
    medians = {n: {k: v["median"] for k, v in by.items() if "median" in v} for n, by in values.items()}
    finite = {n: {k: float(v) for k, v in by.items() if np.isfinite(v)} for n, by in medians.items()}
    return {name: by for name, by in finite.items() if by}


def _by_block(title, values: Values) -> Figure | None:
    panels = _numbers(values)
    if not panels:
        return None
    several = max(len(by) for by in panels.values()) > 1  # with one block the table is enough
    png = plots.by_layer(title("Memory by block"), panels) if several else None
    caption = f"Medians over validation rows. {_sentences(values, panels)}".rstrip()
    return Figure("memory_by_block", "Memory by block", caption, png, _table(values, panels), folded=several)


def _sentences(values: Values, panels: dict[str, Any]) -> str:
    """How to read the diagnostics, and a warning if a memory diverges on some rows."""
    words = []
    if any(name.endswith("surprise_after") for name in panels):
        words.append("A memory that learns at test time has a lower surprise after reading the row than before it.")
    if any(name.endswith("_saturated") for name in panels):
        words.append(
            "Saturation is the part of gate values within 0.01 of 0 or 1: near 1, the gate is the same for every token."
        )
    wild = [
        f"{name} ({block})"
        for name in panels
        if name.endswith(("norm", "surprise_after"))
        for block, by in values[name].items()
        if not by["p99"] <= RUNS_AWAY * by["median"]
    ]
    if wild:
        words.append(
            f"On some rows the memory RUNS AWAY: the 99th percentile is over {RUNS_AWAY} times the median in "
            f"{', '.join(wild)}."
        )
    return " ".join(words)


def _table(values: Values, panels: dict[str, Any]) -> Table:
    blocks = sorted({block for by in panels.values() for block in by}, key=lambda block: int(block.split()[1]))
    rows = []
    for name in panels:
        shown = [values[name].get(block) for block in blocks]
        rows.append((name, *(f"{_number(v['median'])} ({_number(v['p99'])})" if v else "" for v in shown)))
    return Table(("median over rows (99th percentile)", *blocks), rows)


def _number(value: Any) -> str:
    return number(float(value) if np.isfinite(value) else None)


def _by_entry(title, values: Values) -> Figure | None:
    """Diagnostics that are a list per block: a value for each memory, head or segment."""
    panels = {}
    for name, by in values.items():
        lists = {block: v["values"] for block, v in by.items() if np.ndim(v.get("values")) == 1}
        if lists:
            panels[name] = (list(lists), np.asarray(list(lists.values()), float))
    if not panels:
        return None
    png = plots.grids(title("Memory by entry"), "entry", panels)
    caption = (
        "Diagnostics with a value for each entry, averaged over validation rows: a row is a block, a column is a "
        "memory, a head or a segment. Equal numbers in a row mean that the entries do the same work."
    )
    return Figure("memory_by_entry", "Memory by entry", caption, png)


def _by_position(title, values: Values) -> Figure | None:
    """Diagnostics that are one number per position of the row."""
    panels = {
        name: {
            block: (range(1, len(v["by_position"]) + 1), v["by_position"])
            for block, v in by.items()
            if "by_position" in v
        }
        for name, by in values.items()
    }
    panels = {name: panel for name, panel in panels.items() if panel}
    if not panels:
        return None
    png = plots.small_multiples(title("Memory by position"), "position in the row, tokens", panels)
    caption = "Diagnostics of each token, averaged over validation rows."
    return Figure("memory_by_position", "Memory by position", caption, png)


def _recall(title, values: Values) -> Figure | None:
    """Diagnostics that are a table per block: the weight of each past segment in a recall."""
    panels = {
        f"{name}, {block}" if len(by) > 1 else name: np.asarray(v["values"], float)
        for name, by in values.items()
        for block, v in by.items()
        if np.ndim(v.get("values")) == 2
    }
    if not panels:
        return None
    png = plots.heat_maps(title("Recall by segment"), "recalled segment", "segment that begins", panels)
    caption = (
        "The weight of every past segment as a segment begins, averaged over validation rows. A bright diagonal looks "
        "no further back than the last segments. A bright column is a segment that many others recall."
    )
    return Figure("memory_recall", "Recall by segment", caption, png)
