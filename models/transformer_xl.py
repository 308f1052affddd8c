"""Language models with segment caches: Transformer-XL and Memorizing Transformer."""

import dataclasses

from engrax.layers import MemorizingConfig, MixerConfig, TransformerXLConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS


@MODELS.register("transformer_xl")
@dataclasses.dataclass(frozen=True)
class TransformerXLModelConfig(LanguageModelConfig):
    """Every block attends to its segment and the previous one (arXiv 1901.02860)."""

    mixers: tuple[MixerConfig, ...] = (TransformerXLConfig(),)

    @classmethod
    def examples(cls) -> tuple["TransformerXLModelConfig", ...]:
        return (cls(vocab_size=16, dim=8, mixers=TransformerXLConfig.examples()[:1], repeat=2, mlp_hidden=12),)


@MODELS.register("memorizing_transformer")
@dataclasses.dataclass(frozen=True)
class MemorizingTransformerConfig(LanguageModelConfig):
    """Transformer-XL whose last block of every pattern also attends to nearest neighbours (arXiv 2203.08913); the paper
    has one such block in twelve."""

    mixers: tuple[MixerConfig, ...] = (TransformerXLConfig(), MemorizingConfig())

    @classmethod
    def examples(cls) -> tuple["MemorizingTransformerConfig", ...]:
        local = TransformerXLConfig(heads=2, head_dim=4, segment_length=4)
        memorizing = MemorizingConfig.examples()[0]
        return (cls(vocab_size=16, dim=8, mixers=(local, memorizing), repeat=1, mlp_hidden=12),)
