"""The evaluator contract: one measurement of a checkpoint, in one file, registered in EVALUATORS.

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
    """A table of texts and numbers in the report; the first column is left-aligned."""

    columns: Sequence[str]  # the head; () for a table without one
    rows: Sequence[Sequence[Any]]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A section of the report: a plot, a table or both."""

    name: str  # of the plot's file, without .png; unique in an evaluation
    heading: str
    caption: str  # how to read it
    png: bytes | None = None
    table: Table | None = None
    folded: bool = True  # the table is shown on a click


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of an evaluator."""

    values: dict[str, Any]  # content for results.json: nested names to numbers, lists and strings
    figures: list[Figure] = dataclasses.field(default_factory=list)  # in reading order
    summary: list[tuple[str, Any]] = dataclasses.field(default_factory=list)  # (name, value) of the lines printed
    files: dict[str, str] = dataclasses.field(default_factory=dict)  # further files of the folder: name to text


@dataclasses.dataclass(frozen=True)
class EvaluatorConfig(abc.ABC):
    """Base of every evaluator's settings. A subclass is a frozen dataclass under `@engrax.register(name)`.

    Every field needs a default. The evaluator runs in every `engrax evaluate` without `--only`.
    """

    registry: ClassVar[Registry] = EVALUATORS
    registered_name: ClassVar[str] = ""
    order: ClassVar[int] = 100  # place in the report and the summary, ascending
    optional: ClassVar[bool] = False  # True: it runs only if it is named

    def unavailable(self, experiment: Any) -> str | None:
        """The reason, in one sentence, why this evaluator does not apply to the experiment; None if it applies.

        It is called before any computation. If the user named the evaluator, the sentence is the error message.
        """
        return None

    @abc.abstractmethod
    def run(self, context: Any) -> Evaluation:
        """Measures the checkpoint that `context` holds."""
