"""The shared training loop and what it needs."""

from engrax.train.experiment import (
    CheckpointConfig,
    EvalConfig,
    Experiment,
    LogConfig,
    OptimizerConfig,
    ParallelConfig,
)

__all__ = ["CheckpointConfig", "EvalConfig", "Experiment", "LogConfig", "OptimizerConfig", "ParallelConfig"]
