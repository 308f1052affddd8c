"""Palindrome, a task of Kimi Linear (arXiv 2510.26692): repeat a row backwards.

    x_1 ... x_n  SEP  x_n ... x_2        target at each of the last n positions: x_n ... x_1

SEP is 0, the x are uniform in [1, V).
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.task import TaskConfig

SEP = 0


@DATASETS.register("palindrome")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Palindrome(TaskConfig):
    """Repeating a random row backwards."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "vocab_size")

    seq_len: int = 64  # tokens per row, twice those to repeat
    vocab_size: int = 64  # tokens: SEP and those to repeat

    def __post_init__(self):
        super().__post_init__()
        require(self.seq_len % 2 == 0, f"seq_len of palindrome must be even, not {self.seq_len}.")
        require(self.vocab_size >= 2, f"vocab_size must be at least 2, not {self.vocab_size}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the tokens to repeat."""
        return 1.0 / (self.vocab_size - 1)

    def _examples(self, key, row):
        half = self.seq_len // 2
        shown = 1 + hashing.integers(self.vocab_size - 1, *key, row, np.arange(half))
        tokens = np.concatenate([shown, np.full((len(row), 1), SEP), shown[:, :0:-1]], axis=1).astype(np.int32)
        return tokens, self.solve(tokens)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the first half of the row backwards, at the positions of the second; elsewhere -1."""
        half = self.seq_len // 2
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, half:] = tokens[:, :half][:, ::-1]
        return answers
