"""The score on the validation rows."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from engrax.evals import plots
from engrax.evals import statistics as stats
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.words import estimate
from engrax.registry import register

LEVELS = {"chance_in_context": "chance, in context", "chance": "chance", "oracle": "oracle"}


@register("validation")
@dataclasses.dataclass(frozen=True)
class ValidationConfig(EvaluatorConfig):
    """The score on the validation rows: bits per byte, or a task's accuracy beside chance."""

    order: ClassVar[int] = 0

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        values = _values(context)
        summary = [(f"validation {context.unit}", estimate(values["score"]))]
        summary += [(f"  {LEVELS[name]}", f"{value:.4f}") for name, value in (values["task"] or {}).items()]
        if context.kind != "task":
            summary.append(("next-token accuracy", f"{values['accuracy']['value']:.4f}"))
        summary.append(("scored", _scored(context, values)))
        return Evaluation(values, [_figure(context, values), _units(values)], summary)


def _values(context: Context) -> dict[str, Any]:
    rows, scores, weights = context.rows, context.scores(), context.weights
    labelled, bits, text = rows.labelled, scores.nats / math.log(2), context.kind == "text"
    tokens, per_batch = int(labelled.sum()), context.scorer.rows
    return {
        "kind": context.kind,
        "unit": context.unit,
        "score": stats.mean(context.values(), weights).to_dict(),
        "task": _task(context) if context.kind == "task" else None,
        "rows": int(labelled.any(axis=1).sum()),
        "batches": -(-len(rows) // per_batch),
        "rows_per_batch": per_batch,
        "tokens": tokens,
        "bytes": int(weights.sum()) if text else None,
        "complete": rows.complete,
        "bits_per_byte": stats.mean(bits, weights).to_dict() if text else None,
        "bits_per_token": stats.mean(bits, labelled).to_dict(),
        "bytes_per_token": float(weights.sum()) / tokens if text else None,
        "loss_nats_per_token": float(scores.nats.sum(dtype=np.float64)) / tokens,
        "accuracy": stats.mean(scores.right, labelled).to_dict(),
        "tokens_per_second": scores.tokens_per_second,
    }


def answers(context: Context) -> Int[np.ndarray, "N T"]:
    """The answers of the task's oracle for the validation rows."""
    data, tokens = context.experiment.data, context.rows.tokens
    sources = data.sources(np.arange(len(tokens)))
    return data.solve(tokens) if sources is None else data.solve(tokens, sources.index)


def _task(context: Context) -> dict[str, float]:
    """The accuracy of guessing and of the task's own solver."""
    data, rows = context.experiment.data, context.rows
    solved = answers(context) == rows.targets
    known = {name: float(getattr(data, name)) for name in ("chance", "chance_in_context") if hasattr(data, name)}
    return known | {"oracle": float(solved[rows.labelled].mean())}


def _scored(context: Context, values: dict[str, Any]) -> str:
    """What was scored, in one line."""
    part = "the whole validation split" if values["complete"] else "the first validation rows"
    size = f"{values['bytes']:,} bytes in " if values["bytes"] else ""
    length = context.experiment.data.seq_len
    return f"{size}{values['tokens']:,} labelled tokens, {values['rows']:,} rows of {length} ({part})"


def _figure(context: Context, values: dict[str, Any]) -> Figure:
    caption = f"Scored: {_scored(context, values)}. ± is the half-width of a 95 % interval over rows."
    own = values["score"]["value"]
    rows = [("model", estimate(values["score"]), "")]
    rows += [(LEVELS[name], f"{value:.4f}", f"{value - own:+.4f}") for name, value in (values["task"] or {}).items()]
    table = Table(("", context.unit, "minus the model"), rows)
    if not values["task"]:
        return Figure("validation", "Result", caption, table=table, folded=False)
    entries = [{"name": "model", "kind": "model"} | values["score"]]
    entries += [
        {"name": label, "kind": "reference", "value": values["task"][name]}
        for name, label in LEVELS.items()
        if name in values["task"]
    ]
    label = "accuracy on labelled positions (higher is better)"
    png = plots.bars(context.title("Result"), label, entries, limit=1.12)
    words = " ".join((*_task_sentences(own, values["task"]), caption))
    return Figure("validation", "Result", words, png=png, table=table, folded=False)


def _task_sentences(accuracy: float, task: dict[str, float]) -> list[str]:
    sentences = [f"The model answers {accuracy:.1%} of the labelled positions; guessing answers {task['chance']:.1%}."]
    if "chance_in_context" in task:
        sentences.append(
            f"Above {task['chance_in_context']:.1%} it binds keys to values; below, it has at most learnt which tokens "
            "are answers."
        )
    if task["oracle"] < 1:
        sentences.append(f"The oracle scores {task['oracle']:.1%}: not every answer follows from the tokens.")
    return sentences


def _units(values: dict[str, Any]) -> Figure:
    rows = [("bits per token", estimate(values["bits_per_token"]))]
    rows.append(("loss, nats per token", f"{values['loss_nats_per_token']:.4f}"))
    rows.append(("accuracy of the most likely token", estimate(values["accuracy"])))
    if values["bytes_per_token"]:
        rows.append(("bytes per token", f"{values['bytes_per_token']:.4f}"))
    rows.append(("speed of the forward pass, tokens/s", f"{values['tokens_per_second']:,.0f}"))
    caption = "The same rows in other units, and how fast they were read."
    return Figure("units", "Other units", caption, table=Table(("", "value"), rows))
