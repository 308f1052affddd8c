"""Flax NNX layers: one mixer per file, registered by name in MIXERS."""

from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.layers.attention.attention import AttentionConfig
    from engrax.layers.attention.memorizing import MemorizingConfig
    from engrax.layers.attention.transformer_xl import TransformerXLConfig
    from engrax.layers.delta.deltanet import DeltaNetConfig
    from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
    from engrax.layers.delta.kda import KDAConfig
    from engrax.layers.hopfield.association import AssociationConfig, Hopfield
    from engrax.layers.hopfield.energy_transformer import EnergyTransformer, EnergyTransformerConfig
    from engrax.layers.hopfield.layer import HopfieldLayer, HopfieldLayerConfig
    from engrax.layers.hopfield.mixer import HopfieldConfig
    from engrax.layers.hopfield.pooling import HopfieldPooling, HopfieldPoolingConfig
    from engrax.layers.linear.based import BasedConfig
    from engrax.layers.linear.gated_convolution import GatedConvolutionConfig
    from engrax.layers.linear.gla import GLAConfig
    from engrax.layers.linear.gsa import GSAConfig
    from engrax.layers.linear.hgrn2 import HGRN2Config
    from engrax.layers.linear.infini_attention import InfiniAttentionConfig
    from engrax.layers.linear.lightning import LightningConfig
    from engrax.layers.linear.linear_attention import LinearAttentionConfig
    from engrax.layers.linear.mamba2 import Mamba2Config
    from engrax.layers.linear.prefix_linear_attention import PrefixLinearAttentionConfig
    from engrax.layers.linear.rebased import ReBasedConfig
    from engrax.layers.linear.retnet import RetNetConfig
    from engrax.layers.mixer import MIXERS, MixerConfig
    from engrax.layers.routed.mom import MoMConfig
    from engrax.layers.test_time import (
        AtlasConfig,
        LaCTConfig,
        MemoraConfig,
        MemoryConfig,
        MonetaConfig,
        OmegaNetConfig,
        TTTLinearConfig,
        TTTMLPConfig,
        YaadConfig,
    )
    from engrax.layers.test_time.titans import TitansConfig
    from engrax.layers.test_time.titans_mac import MACConfig
    from engrax.layers.test_time.titans_mag import MAGConfig, MALConfig

__all__ = [
    "MIXERS",
    "AtlasConfig",
    "AttentionConfig",
    "BasedConfig",
    "DeltaNetConfig",
    "EnergyTransformer",
    "EnergyTransformerConfig",
    "GLAConfig",
    "GSAConfig",
    "GatedConvolutionConfig",
    "GatedDeltaNetConfig",
    "HGRN2Config",
    "Hopfield",
    "HopfieldConfig",
    "HopfieldLayer",
    "HopfieldLayerConfig",
    "HopfieldPooling",
    "HopfieldPoolingConfig",
    "AssociationConfig",
    "InfiniAttentionConfig",
    "KDAConfig",
    "LaCTConfig",
    "LightningConfig",
    "LinearAttentionConfig",
    "MACConfig",
    "MAGConfig",
    "MALConfig",
    "Mamba2Config",
    "MemoraConfig",
    "MemorizingConfig",
    "MemoryConfig",
    "MixerConfig",
    "MoMConfig",
    "MonetaConfig",
    "OmegaNetConfig",
    "PrefixLinearAttentionConfig",
    "ReBasedConfig",
    "RetNetConfig",
    "TTTLinearConfig",
    "TTTMLPConfig",
    "TitansConfig",
    "TransformerXLConfig",
    "YaadConfig",
]

__getattr__ = lazy.attach(__name__, renamed={"HopfieldSettings": "AssociationConfig"})
