"""Latch: remember the first symbol of a row (Hochreiter and Mozer's task, as in the example code of arXiv 2008.02217).

    c n_1 n_2 ... n_{T-1}

c is one of `classes` symbols [0, classes); the rest are uniform in [classes, vocab_size). The target is c at the last
position and -1 elsewhere.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.task import TaskConfig

_CLASS, _NOISE = range(2)  # the independent random streams of one example


@DATASETS.register("latch")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Latch(TaskConfig):
    """The latch task, generated."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "classes")

    seq_len: int = 32  # tokens per row
    classes: int = 2  # symbols for the first position of a row
    vocab_size: int = 20  # symbols, classes included
    train_examples: int = 4096  # rows of the train split
    validation_examples: int = 1024  # rows of the validation split

    def __post_init__(self):
        super().__post_init__()
        require(
            2 <= self.classes < self.vocab_size,
            f"classes must lie in [2, vocab_size), not {self.classes} of {self.vocab_size}.",
        )

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing among the classes."""
        return 1.0 / self.classes

    def _examples(self, key, row):
        key = (*key, row)
        noise = hashing.bits(*key, _NOISE, np.arange(self.seq_len)) % np.uint64(self.vocab_size - self.classes)
        tokens = self.classes + noise.astype(np.int32)
        tokens[:, 0] = (hashing.bits(*key, _CLASS) % np.uint64(self.classes))[:, 0]
        targets = np.full(tokens.shape, IGNORE, np.int32)
        targets[:, -1] = tokens[:, 0]
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the row's first symbol at every position. It scores 100 %."""
        return np.broadcast_to(tokens[:, :1], tokens.shape)
