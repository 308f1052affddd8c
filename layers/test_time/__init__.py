"""Memories that are trained at test time: one engine; published memories are its settings.

`structures`, `losses`, `retention` and `features` are the parts of a memory; `coefficients` and `engine` run it. `base`
is the mixer around any memory, `mixer` the general mixer, `presets` the published ones.
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
