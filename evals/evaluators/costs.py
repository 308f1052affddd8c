"""What the model costs."""

import dataclasses
from typing import Any, ClassVar

from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.registry import register
from engrax.train import cost


@register("costs")
@dataclasses.dataclass(frozen=True)
class CostsConfig(EvaluatorConfig):
    """What the model costs: parameters, FLOPs, state and optimizer bytes, and the training's speed."""

    order: ClassVar[int] = 210

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        values = cost.costs(context.experiment)
        rows: list[tuple[str, Any]] = [*cost.cost_rows(values)]
        rates = sorted(row["tokens_per_second"] for row in context.history if "tokens_per_second" in row)
        if rates:
            device = context.run.environment.get("device") or "device unknown"
            rows.append((f"training speed, median tokens/s ({device})", f"{rates[len(rates) // 2]:,.0f}"))
        caption = "Known before the first step, apart from the speed."
        figure = Figure("costs", "Cost", caption, table=Table((), rows), folded=False)
        return Evaluation(values, [figure], [("parameters", f"{values['parameters']['total']:,}")])
