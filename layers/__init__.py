"""Flax NNX layers: one mixer per file, found by name in MIXERS."""

from engrax.layers.attention import AttentionConfig
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.titans import TitansConfig

__all__ = ["MIXERS", "AttentionConfig", "MixerConfig", "TitansConfig"]
