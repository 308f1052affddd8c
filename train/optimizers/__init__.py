"""Optimizers: OPTIMIZERS maps a name to an optimizer's config class, one file each."""

from engrax.train.optimizers.adamw import AdamWConfig
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.optimizers.lion import LionConfig
from engrax.train.optimizers.sgd import SGDConfig

__all__ = ["OPTIMIZERS", "AdamWConfig", "LionConfig", "OptimizerConfig", "SGDConfig"]
