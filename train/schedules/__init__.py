"""Learning-rate schedules: SCHEDULES maps a name to a schedule's config class, one file each."""

from engrax.train.schedules.base import SCHEDULES, ScheduleConfig
from engrax.train.schedules.constant import ConstantConfig
from engrax.train.schedules.cosine import CosineConfig
from engrax.train.schedules.wsd import WSDConfig

__all__ = ["SCHEDULES", "ConstantConfig", "CosineConfig", "ScheduleConfig", "WSDConfig"]
