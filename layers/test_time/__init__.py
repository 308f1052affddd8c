"""Memories that are trained at test time: one engine, and the published members of the family as its settings.

`structures`, `losses`, `retention` and `features` are what a memory may be made of; `coefficients` and `engine` run it;
`shell` is the mixer around any memory; `mixer` the general one, `presets` those with names.
"""

from engrax.layers.test_time.mixer import MemoryConfig
from engrax.layers.test_time.presets import (
    AtlasConfig,
    LaCTConfig,
    MemoraConfig,
    MonetaConfig,
    OmegaNetConfig,
    TTTLinearConfig,
    TTTMLPConfig,
    YaadConfig,
)

__all__ = [
    "AtlasConfig",
    "LaCTConfig",
    "MemoraConfig",
    "MemoryConfig",
    "MonetaConfig",
    "OmegaNetConfig",
    "TTTLinearConfig",
    "TTTMLPConfig",
    "YaadConfig",
]
