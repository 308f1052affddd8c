"""Optimizers: OPTIMIZERS maps a name to an optimizer's config class, one file each."""

from engrax.train.optimizers.adafactor import AdafactorConfig
from engrax.train.optimizers.adamw import AdamWConfig
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.optimizers.frugal import FRUGALConfig
from engrax.train.optimizers.galore import GaLoreConfig
from engrax.train.optimizers.lion import LionConfig
from engrax.train.optimizers.muon import MuonConfig
from engrax.train.optimizers.natural_galore import NaturalGaLoreConfig
from engrax.train.optimizers.schedule_free import ScheduleFreeConfig
from engrax.train.optimizers.sgd import SGDConfig
from engrax.train.optimizers.spam import SPAMConfig

__all__ = [
    "OPTIMIZERS",
    "AdafactorConfig",
    "AdamWConfig",
    "FRUGALConfig",
    "GaLoreConfig",
    "LionConfig",
    "MuonConfig",
    "NaturalGaLoreConfig",
    "OptimizerConfig",
    "SGDConfig",
    "SPAMConfig",
    "ScheduleFreeConfig",
]
