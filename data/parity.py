"""Parity: at every position, whether the bits so far hold an even or an odd number of ones."""

import dataclasses
from typing import ClassVar

import numpy as np

from engrax.data import hashing
from engrax.data.config import DATASETS
from engrax.data.formal_language import STRING, FormalLanguage


@DATASETS.register("parity")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(FormalLanguage):
    """The parity of the ones so far, at every bit of a random string."""

    symbols: ClassVar[int] = 2
    label_names: ClassVar[tuple[str, ...]] = ("even", "odd")

    def _strings(self, keys, length):
        return hashing.integers(2, *keys, STRING, np.arange(self.seq_len))

    def _labels(self, strings):
        return (strings == 1).cumsum(axis=1) % 2
