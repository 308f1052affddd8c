"""The evaluator contract: one thing measured on one checkpoint, in one file, found by name in EVALUATORS.

@engrax.register("my_measure")
@dataclasses.dataclass(frozen=True)
class MyMeasureConfig(engrax.EvaluatorConfig):
    '''The first line says what is measured; `engrax list` prints it.'''

    def run(self, context) -> Evaluation:
        return Evaluation(values={"x": 1.0}, summary=[("x", "1.0")])
"""

import dataclasses
from typing import Any, ClassVar

from engrax.registry import Registry

EVALUATORS = Registry("evaluator", "engrax.evals")


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluator found."""

    values: dict[str, Any]  # nested names to numbers, lists and strings: what goes into results.json
    figures: list[Any] = dataclasses.field(default_factory=list)  # each with a name and PNG bytes, in reading order
    summary: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (name, value) of the lines printed


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig:
    """Base of every evaluator's settings. A subclass is a frozen dataclass under `@engrax.register(name)`."""

    registry: ClassVar[Registry] = EVALUATORS
    registered_name: ClassVar[str] = ""

    def run(self, context: Any) -> Evaluation:
        """Measures the checkpoint that `context` holds."""
        raise NotImplementedError(f"{type(self).__name__} must define run(context).")
