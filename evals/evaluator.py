"""The evaluator contract: one thing measured on one checkpoint, in one file, found by name in EVALUATORS.

@engrax.register("my_measure")
@dataclasses.dataclass(frozen=True)
class MyMeasureConfig(engrax.EvaluatorConfig):
    '''The first line says what is measured; `engrax list` prints it.'''

    def run(self, context) -> Evaluation:
        accuracy = float(context.scores().right[context.rows.labelled].mean())
        return Evaluation({"accuracy": accuracy}, summary=[("accuracy", f"{accuracy:.3f}")])

`context` is an `engrax.evals.Context`: the run, its model, the validation rows and their scores.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from engrax.registry import Registry

EVALUATORS = Registry("evaluator", "engrax.evals")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts and numbers, as the report shows it; the first column is aligned to the left."""

    columns: Sequence[str]  # the head; () for a table without one
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A section of the report: a plot, a table or both."""

    name: str  # of the plot's file, without .png; unique in an evaluation
    heading: str
    caption: str  # what the reader should see
    png: bytes | None = None
    table: Table | None = None
    folded: bool = True  # the table is shown on a click


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluator found."""

    values: dict[str, Any]  # nested names to numbers, lists and strings: what goes into results.json
    figures: list[Figure] = dataclasses.field(default_factory=list)  # in reading order
    summary: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (name, value) of the lines printed


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig(abc.ABC):
    """Base of every evaluator's settings. A subclass is a frozen dataclass under `@engrax.register(name)`.

    Every field needs a default. The evaluator runs in each `engrax evaluate` that does not choose others (`--only`).
    """

    registry: ClassVar[Registry] = EVALUATORS
    registered_name: ClassVar[str] = ""
    order: ClassVar[int] = 100  # place in the report and the summary, ascending
    optional: ClassVar[bool] = False  # True: it runs only where it is named

    def unavailable(self, experiment: Any) -> str | None:
        """Why a run of this experiment cannot be evaluated so, in one sentence; None where it can.

        It is asked before anything is computed. Where the evaluator was named, the sentence is the user's error.
        """
        return None

    @abc.abstractmethod
    def run(self, context: Any) -> Evaluation:
        """Measures the checkpoint that `context` holds."""
