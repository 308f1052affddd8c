"""Memories that are trained at test time: one mixer; published memories are its settings.

`structures`, `losses`, `retention` and `features` are the parts of a memory, and `rule` puts them together. `operation`
runs the rules that the operation `neural_memory` has, Titans' among them; `engine` and `coefficients` run the others.
`base` is the mixer around any memory, `mixer` the general mixer; `presets` and `titans` are published settings of it,
and `titans_mac` and `titans_mag` combine a memory with attention.
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
