"""Evaluation of checkpoints, and fair comparisons: metrics, baselines, plots, reports."""

from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.evals.comparison import Claim, Comparison
    from engrax.evals.comparison_report import ComparisonResult, compare
    from engrax.evals.evaluation import Results, evaluate

__all__ = ["Claim", "ComparisonResult", "Comparison", "Results", "compare", "evaluate"]

__getattr__ = lazy.attach(__name__)
