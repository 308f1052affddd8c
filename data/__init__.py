"""Data sets: text and generated memory tasks with one contract (`DataConfig`), registered by name in `DATASETS`."""

from typing import TYPE_CHECKING

from engrax import lazy

if TYPE_CHECKING:
    from engrax.data.bit_patterns import BitPatterns
    from engrax.data.config import DATASETS, Batch, DataConfig, Loader
    from engrax.data.digits import load_digits
    from engrax.data.latch import Latch
    from engrax.data.mixture import Mixture
    from engrax.data.mqar import MQAR
    from engrax.data.set_disjointness import SetDisjointness
    from engrax.data.stdlib_text import StdlibText
    from engrax.data.text_folder import TextFolder
    from engrax.data.tfds_text import TfdsText
    from engrax.data.tokenizers import ByteTokenizer, JsonTokenizer

__all__ = [
    "DATASETS",
    "MQAR",
    "Batch",
    "BitPatterns",
    "ByteTokenizer",
    "DataConfig",
    "JsonTokenizer",
    "Latch",
    "Loader",
    "Mixture",
    "SetDisjointness",
    "StdlibText",
    "TextFolder",
    "TfdsText",
    "load_digits",
]

__getattr__ = lazy.attach(__name__)
