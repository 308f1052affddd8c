"""The accuracy of each task of a mixture."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from engrax.evals import plots
from engrax.evals import statistics as stats
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.evaluators.validation import answers
from engrax.evals.words import estimate
from engrax.registry import register


@register("sources")
@dataclasses.dataclass(frozen=True)
class SourcesConfig(EvaluatorConfig):
    """The accuracy of each task of a mixture, beside its chance and its oracle."""

    order: ClassVar[int] = 5

    def unavailable(self, experiment) -> str | None:
        """See `EvaluatorConfig`."""
        if experiment.data.sources(np.arange(1)) is None:
            return f"sources are the parts of a mixture, and {experiment.data.registered_name} is none."
        return None

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        values = _values(context)
        summary = [(f"  {name}", f"{estimate(v['accuracy'])} (chance {v['chance']:.4f})") for name, v in values.items()]
        return Evaluation({"accuracies": values}, [_figure(context, values)], summary)


def _values(context: Context) -> dict[str, Any]:
    """By the source's name: its accuracy over labelled positions and over whole rows, its chance and its oracle."""
    rows, right, data = context.rows, context.scores().right, context.experiment.data
    names, source = data.sources(np.arange(len(rows)))
    oracle, labelled, found = answers(context) == rows.targets, rows.labelled, {}
    for i, name in enumerate(names):
        asked = labelled & (source == i)[:, None]
        of = asked.any(axis=1)
        if not of.any():
            continue
        whole = (right | ~asked).all(axis=1)[of, None]
        found[name] = {
            "rows": int(of.sum()),
            "accuracy": stats.mean(right & asked, asked).to_dict(),
            "whole_rows": stats.mean(whole, np.ones_like(whole)).to_dict(),
            "chance": data.tasks[i].chance,
            "oracle": float(oracle[asked].mean()),
        }
    return found


def _figure(context: Context, values: dict[str, Any]) -> Figure:
    heading = "Accuracy of each task"
    entries = [{"name": name, "kind": "model"} | v["accuracy"] for name, v in values.items()]
    png = plots.bars(context.title(heading), "accuracy on labelled positions (higher is better)", entries, limit=1.12)
    rows = []
    for name, v in values.items():
        ends = [f"{v[level]:.4f}" for level in ("chance", "oracle")]
        rows.append((name, v["rows"], estimate(v["accuracy"]), estimate(v["whole_rows"]), *ends))
    columns = ("task", "rows", "accuracy", "rows all right", "chance", "oracle")
    caption = (
        "The validation split has the tasks as they are at the end of the curriculum. ± is the half-width of a 95 % "
        "interval over rows; in a row all right, every labelled position is."
    )
    return Figure("sources", heading, caption, png=png, table=Table(columns, rows), folded=False)
