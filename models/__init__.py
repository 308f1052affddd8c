"""Complete networks: MODELS maps a name to a model's config class."""

from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.models.armt import ARMTConfig
    from engrax.models.contract import LinearHead, Model, Output
    from engrax.models.hmt import HMTConfig
    from engrax.models.language_model import LanguageModelConfig
    from engrax.models.model import MODELS, ModelConfig, build
    from engrax.models.rmt import RMTConfig
    from engrax.models.titans import TitansLMMConfig, TitansMACConfig, TitansMAGConfig, TitansMALConfig
    from engrax.models.transformer_xl import MemorizingTransformerConfig, TransformerXLModelConfig

__all__ = [
    "MODELS",
    "ARMTConfig",
    "HMTConfig",
    "LanguageModelConfig",
    "LinearHead",
    "MemorizingTransformerConfig",
    "Model",
    "ModelConfig",
    "Output",
    "RMTConfig",
    "TitansLMMConfig",
    "TitansMACConfig",
    "TitansMAGConfig",
    "TitansMALConfig",
    "TransformerXLModelConfig",
    "build",
]

__getattr__ = lazy.attach(__name__)
