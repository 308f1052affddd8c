"""Evaluation of checkpoints, and fair comparisons: metrics, baselines, plots, reports."""

from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.evals.claims import Card
    from engrax.evals.comparison import Claim, Comparison
    from engrax.evals.comparison_report import ComparisonResult, compare, compare_runs
    from engrax.evals.context import Context
    from engrax.evals.evaluation import Results, evaluate
    from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
    from engrax.evals.frontier import Frontier
    from engrax.evals.frontier_report import FrontierResult

__all__ = [
    "Card",
    "Claim",
    "Comparison",
    "ComparisonResult",
    "Context",
    "Evaluation",
    "EvaluatorConfig",
    "Figure",
    "Frontier",
    "FrontierResult",
    "Results",
    "Table",
    "compare",
    "compare_runs",
    "evaluate",
]

__getattr__ = lazy.attach(__name__)
