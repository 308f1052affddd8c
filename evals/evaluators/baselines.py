"""N-gram baselines on the model's own text."""

import dataclasses
from typing import Any, ClassVar

from engrax.evals import plots, scoring
from engrax.evals import statistics as stats
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.evals.words import estimate
from engrax.registry import register


@register("baselines")
@dataclasses.dataclass(frozen=True)
class BaselinesConfig(EvaluatorConfig):
    """N-grams counted on the text that the model was trained on, scored on the same targets."""

    order: ClassVar[int] = 10

    def unavailable(self, experiment: Any) -> str | None:
        """They are models of text."""
        return None if scoring.kind_of(experiment) == "text" else "baselines are n-grams of text; this data is no text."

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        counted, bits = context.baseline
        orders = [{"order": k} | stats.mean(bits[k], context.weights).to_dict() for k in range(1, len(bits))]
        own = stats.mean(context.values(), context.weights).to_dict()
        best = min(orders, key=lambda found: found["value"])
        gap = best["value"] - own["value"]
        caption = (
            f"The model needs {own['value']:.3f} {context.unit}, {abs(gap):.3f} {'less' if gap > 0 else 'MORE'} than "
            f"the best n-gram (order {best['order']}). {_counted(counted)}"
        )
        entries = [{"name": "model", "kind": "model"} | own]
        entries += [{"name": f"order-{f['order']} n-gram", "kind": "baseline"} | f for f in reversed(orders)]
        png = plots.bars(context.title("Baselines"), f"{context.unit} (lower is better)", entries)
        rows = [("model", estimate(own), "")]
        rows += [(f"order-{f['order']} n-gram", estimate(f), f"{f['value'] - own['value']:+.4f}") for f in orders]
        table = Table(("", context.unit, "minus the model"), rows)
        summary = [(f"order-{f['order']} n-gram, same training text", f"{f['value']:.4f}") for f in reversed(orders)]
        return Evaluation(
            counted | {"orders": orders}, [Figure("baselines", "Baselines", caption, png, table)], summary
        )


def _counted(found: dict[str, Any]) -> str:
    part = "all" if found["counted_all_seen"] else "the first"
    times = f" (seen {found['epochs_seen']:.2f} times)" if found["epochs_seen"] == found["epochs_seen"] else ""
    return (
        f"The n-grams over {found['unit']} ({found['smoothing']}) are counted on {part} {found['counted_bytes']:,} "
        f"bytes that the model was trained on{times}. They score the same targets with the same context, cut at the "
        "ends of segments."
    )
