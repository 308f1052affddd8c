"""Whole networks: MODELS maps a name to a model's config class."""

from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS, ModelConfig

__all__ = ["MODELS", "LanguageModelConfig", "ModelConfig"]
