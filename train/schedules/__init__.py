"""Learning-rate schedules: SCHEDULES maps a name to a schedule's config class, one file each."""

from engrax.train.schedules.base import SCHEDULES, ScheduleConfig
from engrax.train.schedules.constant import ConstantConfig
from engrax.train.schedules.cosine import CosineConfig
from engrax.train.schedules.infinite import InfiniteConfig
from engrax.train.schedules.inverse_root import InverseRootConfig
from engrax.train.schedules.linear import LinearConfig
from engrax.train.schedules.wsd import WSDConfig
from engrax.train.schedules.wsd_s import WSDSConfig

__all__ = [
    "SCHEDULES",
    "ConstantConfig",
    "CosineConfig",
    "InfiniteConfig",
    "InverseRootConfig",
    "LinearConfig",
    "ScheduleConfig",
    "WSDConfig",
    "WSDSConfig",
]
