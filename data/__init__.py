"""Data: text and generated memory tasks behind one contract (`DataConfig`), found by name in `DATASETS`."""

from engrax.data.config import DATASETS, Batch, DataConfig, Loader
from engrax.data.mqar import MQAR
from engrax.data.stdlib_text import StdlibText
from engrax.data.text_folder import TextFolder
from engrax.data.tfds_text import TfdsText
from engrax.data.tokenizers import ByteTokenizer, JsonTokenizer

__all__ = [
    "DATASETS",
    "MQAR",
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "JsonTokenizer",
    "Loader",
    "StdlibText",
    "TextFolder",
    "TfdsText",
]
