"""The score by position in the row and by length of context."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from engrax.evals import plots
from engrax.evals import statistics as stats
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.words import estimate
from engrax.registry import register

# The length of context has a plot of its own where more than this part of the tokens is in later segments of a row.
PACKED = 0.1


@register("by_position")
@dataclasses.dataclass(frozen=True)
class ByPositionConfig(EvaluatorConfig):
    """The score by position in the row: of the model, with each memory muted, and of the best n-gram."""

    order: ClassVar[int] = 30

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        curves = {"model": ("model", context.values())}
        for name in context.memories:
            curves[f"{name} muted"] = ("muted", context.values((name,)))
        if context.kind == "text":
            bits = context.baseline[1]
            curves[f"order-{len(bits) - 1} n-gram"] = ("baseline", bits[-1])
        packed = (context.rows.segment_ids[context.rows.labelled] > 0).mean() > PACKED
        values = {"position": _curves(context, curves, by_context=False), "context": None}
        figures = [_figure(context, "by_position", "Score by position", values["position"])]
        if packed and context.kind != "task":
            values["context"] = _curves(context, curves, by_context=True)
            figures.append(_figure(context, "by_context", "Score by length of context", values["context"]))
        return Evaluation(values, figures)


def _curves(context: Context, curves: dict[str, tuple], *, by_context: bool) -> dict[str, Any]:
    """The curves over bins of the position in the row, or of the tokens of context that a prediction had."""
    rows = context.rows
    length = rows.tokens.shape[1]
    positions = np.broadcast_to(np.arange(length), rows.tokens.shape)
    if context.kind == "task":
        asked = np.flatnonzero(rows.labelled.any(axis=0))
        edges = stats.even_bins(int(asked[0]), int(asked[-1]))
    else:
        edges = stats.log_bins(length)
    if by_context:
        positions = stats.context_positions(rows.segment_ids)
    return {
        "axis": "tokens of context" if by_context else "position in the row, tokens",
        "curves": [
            {"name": name, "kind": kind, "bins": stats.by_position(values, context.weights, positions, edges)}
            for name, (kind, values) in curves.items()
        ],
    }


def _figure(context: Context, name: str, heading: str, values: dict[str, Any]) -> Figure:
    task, data = context.kind == "task", context.experiment.data
    names = {"chance": "chance", "chance_in_context": "chance in context"}
    levels = [(label, getattr(data, key)) for key, label in names.items() if task and hasattr(data, key)]
    png = plots.curves(
        context.title(heading),
        (values["axis"], context.unit),
        values["curves"],
        log_x=not task,
        levels=levels,
        y_range=(-0.03, 1.06) if task else None,
    )
    return Figure(name, heading, _caption(context, values), png, table(values))


def _caption(context: Context, values: dict[str, Any]) -> str:
    bins = values["curves"][0]["bins"]
    band = "The band is the model's 95 % interval over rows."
    if context.kind == "task":
        return f"Accuracy of the answers at each position. A memory that forgets falls off to the right. {band}"
    end = bins[-1]["to"]
    halves = _mean_of(bins, 0, end // 2), _mean_of(bins, end // 2, end)
    sentences = ["A model that uses its context falls to the right."]
    if None not in halves:
        verb = "gains" if halves[0] > halves[1] else "loses"
        sentences.append(
            f"From the first half to the second the model {verb} {abs(halves[0] - halves[1]):.3f} {context.unit}."
        )
    if context.memories:
        sentences.append("The gap between the model and its muted form is what the memory gives at that distance.")
    return " ".join((*sentences, band))


def _mean_of(bins: list[dict[str, Any]], first: int, last: int) -> float | None:
    inside = [b for b in bins if first <= (b["from"] + b["to"]) / 2 < last]
    return float(np.average([b["value"] for b in inside], weights=[b["tokens"] for b in inside])) if inside else None


def table(values: dict[str, Any]) -> Table:
    """The numbers of curves over bins: {"axis", "curves": [{"name", "bins"}]}."""
    lines = values["curves"]
    rows = []
    for i, b in enumerate(lines[0]["bins"]):
        where = f"{b['from'] + 1:,}" if b["to"] == b["from"] + 1 else f"{b['from'] + 1:,} to {b['to']:,}"
        rows.append((where, f"{b['tokens']:,}", *(estimate(line["bins"][i], 3) for line in lines)))
    return Table((values["axis"], "scored tokens", *(line["name"] for line in lines)), rows)
