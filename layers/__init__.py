"""Flax NNX layers: one mixer per file, found by name in MIXERS."""

from engrax.layers.attention import AttentionConfig
from engrax.layers.based import BasedConfig
from engrax.layers.deltanet import DeltaNetConfig
from engrax.layers.energy_transformer import EnergyTransformer, EnergyTransformerConfig
from engrax.layers.gated_convolution import GatedConvolutionConfig
from engrax.layers.gated_deltanet import GatedDeltaNetConfig
from engrax.layers.gla import GLAConfig
from engrax.layers.gsa import GSAConfig
from engrax.layers.hgrn2 import HGRN2Config
from engrax.layers.hopfield import Hopfield, HopfieldSettings
from engrax.layers.hopfield_layer import HopfieldLayer, HopfieldLayerConfig
from engrax.layers.hopfield_mixer import HopfieldConfig
from engrax.layers.hopfield_pooling import HopfieldPooling, HopfieldPoolingConfig
from engrax.layers.infini_attention import InfiniAttentionConfig
from engrax.layers.kda import KDAConfig
from engrax.layers.lightning import LightningConfig
from engrax.layers.linear_attention import LinearAttentionConfig
from engrax.layers.mamba2 import Mamba2Config
from engrax.layers.memorizing import MemorizingConfig
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.mom import MoMConfig
from engrax.layers.prefix_linear_attention import PrefixLinearAttentionConfig
from engrax.layers.rebased import ReBasedConfig
from engrax.layers.retnet import RetNetConfig
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
from engrax.layers.titans import TitansConfig
from engrax.layers.titans_mac import MACConfig
from engrax.layers.titans_mag import MAGConfig, MALConfig
from engrax.layers.transformer_xl import TransformerXLConfig

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
    "HopfieldSettings",
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
