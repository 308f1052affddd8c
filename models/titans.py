"""The four Titans of arXiv 2501.00663 as language models: memory alone, as context, as gate, as layer."""

import dataclasses

from engrax.layers import MACConfig, MAGConfig, MALConfig, MixerConfig, TitansConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS


class _Titans(LanguageModelConfig):
    @classmethod
    def examples(cls):
        mixer = type(cls().mixers[0]).examples()[0]
        return (cls(vocab_size=16, dim=8, mixers=(mixer,), repeat=2, mlp_hidden=12),)


@MODELS.register("titans_lmm")
@dataclasses.dataclass(frozen=True)
class TitansLMMConfig(_Titans):
    """Long-term memory alone (section 4.3, end): no attention."""

    mixers: tuple[MixerConfig, ...] = (TitansConfig(persistent_tokens=4),)


@MODELS.register("titans_mac")
@dataclasses.dataclass(frozen=True)
class TitansMACConfig(_Titans):
    """Memory as context (section 4.1), causal unless its mixer's mode says otherwise."""

    mixers: tuple[MixerConfig, ...] = (MACConfig(),)


@MODELS.register("titans_mag")
@dataclasses.dataclass(frozen=True)
class TitansMAGConfig(_Titans):
    """Memory as gate of a sliding window (section 4.2)."""

    mixers: tuple[MixerConfig, ...] = (MAGConfig(),)


@MODELS.register("titans_mal")
@dataclasses.dataclass(frozen=True)
class TitansMALConfig(_Titans):
    """Memory as a layer before a sliding window (section 4.3)."""

    mixers: tuple[MixerConfig, ...] = (MALConfig(),)
