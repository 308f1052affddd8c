"""The effect of each memory on the trained model's score."""

import dataclasses
from typing import Any, ClassVar

from engrax.evals import plots
from engrax.evals import statistics as stats
from engrax.evals.context import Context, memory_names
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.words import estimate, signed
from engrax.registry import register


@register("memory_ablation")
@dataclasses.dataclass(frozen=True)
class MemoryAblationConfig(EvaluatorConfig):
    """The score with the reads of each memory set to zero, without retraining."""

    order: ClassVar[int] = 20

    def unavailable(self, experiment: Any) -> str | None:
        """There must be a memory."""
        return None if memory_names(experiment) else "memory_ablation mutes memory reads, and no mixer here has any."

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        own = context.values()
        values = {}
        for name in context.memories:
            muted = context.values((name,))
            values[name] = {
                "muted": stats.mean(muted, context.weights).to_dict(),
                "difference": stats.mean(muted - own, context.weights).to_dict(),  # by row
            }
        summary = [
            (f"{name} muted", f"{found['muted']['value']:.4f} ({signed(found['difference'])})")
            for name, found in values.items()
        ]
        score = stats.mean(own, context.weights).to_dict()
        return Evaluation(values, [_figure(context, score, values)] if values else [], summary)


def _figure(context: Context, score: dict[str, Any], values: dict[str, Any]) -> Figure:
    task = context.kind == "task"
    entries = [{"name": "model", "kind": "model"} | score]
    entries += [{"name": f"{name} muted", "kind": "muted"} | found["muted"] for name, found in values.items()]
    label = f"{context.unit} ({'higher' if task else 'lower'} is better)"
    png = plots.bars(context.title("Memory ablation"), label, entries, limit=1.12 if task else None)
    rows = [("model", estimate(score), "")]
    rows += [(f"{name} muted", estimate(f["muted"]), signed(f["difference"])) for name, f in values.items()]
    sentences = [sentence(name, found["difference"], context.kind) for name, found in values.items()]
    sentences.append(
        "Muted: the memory's reads are set to zero in the trained model. All else in the mixer stays, such as "
        "attention and convolutions. Differences are paired by row."
    )
    table = Table(("", context.unit, "minus the model"), rows)
    return Figure("memory_ablation", "Memory ablation", " ".join(sentences), png, table)


def sentence(name: str, change: dict[str, Any], kind: str) -> str:
    """Describes the effect of muting one memory, according to the sign and interval of the change."""
    low, high, value = change["low"], change["high"], change["value"]
    if low is not None and low <= 0 <= high:
        return f"Muting the memory reads of {name} changes the score by {value:+.3f}, which is within chance."
    worse = value > 0 if kind != "task" else value < 0
    end = "worsens" if worse else "IMPROVES"
    return f"Muting the memory reads of {name} {end} the score by {abs(value):.3f}" + (
        ": the model uses this memory." if worse else "."
    )
