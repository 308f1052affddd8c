"""Whole networks: MODELS maps a name to a model's config class."""

from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS, ModelConfig
from engrax.models.titans import TitansLMMConfig, TitansMACConfig, TitansMAGConfig, TitansMALConfig

__all__ = [
    "MODELS",
    "LanguageModelConfig",
    "ModelConfig",
    "TitansLMMConfig",
    "TitansMACConfig",
    "TitansMAGConfig",
    "TitansMALConfig",
]
