"""The course of the training, from the run's metrics.jsonl."""

import dataclasses
import math
from typing import Any, ClassVar

import numpy as np

from engrax.evals import plots
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.words import number
from engrax.registry import register


@register("training")
@dataclasses.dataclass(frozen=True)
class TrainingConfig(EvaluatorConfig):
    """The course of the training: loss, speed, and the memories' diagnostics by step."""

    order: ClassVar[int] = 200

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        values = _values(context.history)
        drawn = (_losses(context, values), _memory(context))
        return Evaluation(values, [figure for figure in drawn if figure is not None])


def _values(history: list[dict[str, Any]]) -> dict[str, Any]:
    """A summary of metrics.jsonl."""

    def of(key: str) -> list[float]:
        return [row[key] for row in history if key in row]

    losses, added, rates, first = (of(k) for k in ("loss", "aux_loss", "tokens_per_second", "seconds_to_first_step"))
    losses = [loss for loss in losses if isinstance(loss, float)]  # a text where it is not finite
    blocked = of("save_blocked_seconds")
    validated = [
        (row["validation_loss"], row["step"]) for row in history if isinstance(row.get("validation_loss"), float)
    ]
    best = min(validated, default=(None, None))
    return {
        "last_step": history[-1]["step"] if history else None,
        "last_loss": losses[-1] if losses else None,
        "last_aux_loss": added[-1] if added else None,
        "best_validation_loss": best[0],
        "best_validation_step": best[1],
        "tokens_per_second_median": float(np.median(rates)) if rates else None,
        "seconds_to_first_step": first[0] if first else None,
        "save_blocked_seconds_median": float(np.median(blocked)) if blocked else None,
        "skipped_steps": sum(len(steps) for steps in skipped(history).values()) or None,
    }


def skipped(history: list[dict[str, Any]]) -> dict[str, list[int]]:
    """{reason: steps} of the steps that changed nothing (`train.guards`)."""
    found: dict[str, list[int]] = {}
    for row in history:
        for key in (key for key in row if key.startswith("skipped_")):
            found.setdefault(key.removeprefix("skipped_").replace("_", " "), []).append(row["step"])
    return found


def _listed(steps: list[int], most: int = 20) -> str:
    return ", ".join(map(str, steps[:most])) + (f" and {len(steps) - most} more" if len(steps) > most else "")


def series(history: list[dict[str, Any]], key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """(steps, values) of the rows that have a finite `key`."""
    rows = [(row["step"], float(row[key]) * scale) for row in history if key in row]
    rows = sorted((step, value) for step, value in rows if math.isfinite(value))
    return [step for step, _ in rows], [value for _, value in rows]


def panels(history: list[dict[str, Any]], kind: str, bytes_per_token: float | None) -> list[dict[str, Any]]:
    """The panels of the plot, as `plots.training` takes them; [] with fewer than two logged steps.

    The loss is that of the data, in bits per byte for text; auxiliary losses have a separate panel.
    """
    in_bits = kind == "text" and bytes_per_token
    unit, scale = ("bits per byte", 1 / math.log(2) / bytes_per_token) if in_bits else ("loss, nats per token", 1.0)
    loss, validation = (series(history, key, scale) for key in ("loss", "validation_loss"))
    if len(loss[0]) < 2:
        return []
    lines = [{"name": "training", "x": loss[0], "y": loss[1], "style": "line"}]
    if validation[0]:
        lines.append({"name": "validation", "x": validation[0], "y": validation[1], "style": "points"})
    found = [{"label": unit, "series": lines, "zero": False}]
    more = [("aux_loss", "added by the mixers, nats per token", "line")]
    more.append(("tokens_per_second", "tokens per second", "line"))
    if kind == "task":
        more.insert(0, ("validation_accuracy", "validation accuracy", "points"))
    for key, label, style in more:
        x, y = series(history, key)
        if len(x) > (style == "line") and any(y):
            found.append({"label": label, "series": [{"name": "", "x": x, "y": y, "style": style}], "zero": True})
    return found


def _losses(context: Context, values: dict[str, Any]) -> Figure | None:
    drawn = panels(context.history, context.kind, _bytes_per_token(context))
    if not drawn:
        return None
    caption = (
        "Validation close to training means little overfitting. A curve that still falls at its end means that more "
        "steps would help. Faint: every logged step; bold: its running mean. Validation during training uses fewer "
        "rows than this evaluation. Speed leaves out evaluations and saves."
    )
    rows = [(name.replace("_", " "), number(value)) for name, value in values.items() if value is not None]
    rows += [(f"skipped: {reason}", f"steps {_listed(steps)}") for reason, steps in skipped(context.history).items()]
    png = plots.training(context.title("Training"), drawn, context.step)
    return Figure("training", "Training", caption, png, Table((), rows))


def _bytes_per_token(context: Context) -> float | None:
    """Of the validation text; None where the data is no text."""
    if context.kind != "text":
        return None
    return float(context.weights.sum() / context.rows.labelled.sum())


def _memory(context: Context) -> Figure | None:
    """Keys "memory/titans.lr_mean/0" of the logged rows; the last part counts the repeats of the pattern."""
    found: dict[str, dict[str, tuple]] = {}
    for key in sorted({key for row in context.history for key in row if key.startswith("memory/")}):
        _, name, repeat = key.split("/")
        x, y = series(context.history, key)
        if len(x) > 1:
            found.setdefault(name, {})[context.block(name, int(repeat))] = (x, y)
    if not found:
        return None
    heading = "Memory over training"
    png = plots.small_multiples(context.title(heading), "training step", found, step=context.step)
    caption = (
        "Each diagnostic at every validation: the mean over one batch, a line per block. Gates that move away from "
        "their start show that the memory is being trained. Norms should settle rather than run away."
    )
    return Figure("memory_over_training", heading, caption, png)
