"""Compression of MAD (arXiv 2403.17844) for a causal model: repeat a row from the state after it.

    x_1 ... x_n  C_1 ... C_n        target at C_i: x_i

The x are uniform in [0, V - 1), every C is the token V - 1. MAD reads all x_i from the hidden state at one C, through a
decoder of its own. Here the model writes them out itself. A model with a fixed state must compress the row into it;
attention need not, as it can look back. MAD's setting of 31 tokens is `seq_len=62`.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.task import TaskConfig


@DATASETS.register("compression")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Compression(TaskConfig):
    """MAD's compression: repeat a random row from the state after it."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "vocab_size", "train_examples")

    seq_len: int = 62  # tokens per row, twice those to repeat
    vocab_size: int = 16  # tokens: those to repeat, and C
    train_examples: int = 12_800  # rows of the train split
    validation_examples: int = 1_280  # rows of the validation split

    def __post_init__(self):
        super().__post_init__()
        require(self.seq_len % 2 == 0, f"seq_len of compression must be even, not {self.seq_len}.")
        require(self.vocab_size >= 2, f"vocab_size must be at least 2, not {self.vocab_size}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the tokens to repeat."""
        return 1.0 / (self.vocab_size - 1)

    def _examples(self, key, row):
        half = self.seq_len // 2
        tokens = np.full((len(row), self.seq_len), self.vocab_size - 1, np.int32)
        tokens[:, :half] = hashing.integers(self.vocab_size - 1, *key, row, np.arange(half))
        return tokens, self.solve(tokens)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the first half of the row, at the positions of the second; elsewhere -1."""
        half = self.seq_len // 2
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, half:] = tokens[:, :half]
        return answers
