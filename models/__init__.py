"""Whole networks: MODELS maps a name to a model's config class."""

from engrax.models.armt import ARMTConfig
from engrax.models.hmt import HMTConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS, ModelConfig
from engrax.models.rmt import RMTConfig
from engrax.models.titans import TitansLMMConfig, TitansMACConfig, TitansMAGConfig, TitansMALConfig
from engrax.models.transformer_xl import MemorizingTransformerConfig, TransformerXLModelConfig

__all__ = [
    "MODELS",
    "ARMTConfig",
    "HMTConfig",
    "LanguageModelConfig",
    "MemorizingTransformerConfig",
    "ModelConfig",
    "RMTConfig",
    "TitansLMMConfig",
    "TitansMACConfig",
    "TitansMAGConfig",
    "TitansMALConfig",
    "TransformerXLModelConfig",
]
