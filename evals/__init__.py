"""Evaluation of checkpoints: metrics, baselines, plots and one self-contained report."""

from engrax.evals.evaluation import Results, evaluate

__all__ = ["Results", "evaluate"]
