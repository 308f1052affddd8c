"""Memorization of MAD (arXiv 2403.17844): one fixed map from keys to values, which the rows never show.

    k_1 INSERT k_2 INSERT ...        target at each INSERT: the value of the key before it

The map is drawn once from the seed and is the same in both splits: a model must hold it in its parameters. Of the V
tokens, V - 1 is INSERT, and the others are keys (lower half) and values (upper half). Keys have distinct values and are
drawn with replacement.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32, Int64

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, SPLITS, require
from engrax.data.task import TaskConfig

_KEYS, _MAP = range(2)  # the independent random streams of one example, and that of the map


@DATASETS.register("memorization")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memorization(TaskConfig):
    """MAD's memorization: a fixed map from keys to values, learnt by heart."""

    axes: ClassVar[tuple[str, ...]] = ("vocab_size",)

    seq_len: int = 32  # tokens per row
    vocab_size: int = 256  # tokens: keys, values and INSERT
    train_examples: int = 256  # rows of the train split
    validation_examples: int = 1_280  # rows of the validation split

    def __post_init__(self):
        super().__post_init__()
        require(self.seq_len % 2 == 0, f"seq_len of memorization must be even, not {self.seq_len}.")
        require(self.vocab_size >= 3, f"vocab_size must be at least 3 (key, value, INSERT), not {self.vocab_size}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens."""
        return 1.0 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    @property
    def facts(self) -> Int64[np.ndarray, " keys"]:
        """The value of every key."""
        keys = (self.vocab_size - 1) // 2
        return keys + hashing.permutation(self.vocab_size - 1 - keys, self.seed, len(SPLITS), _MAP)[:keys]

    def _examples(self, key, row):
        facts = self.facts
        keys = hashing.integers(len(facts), *key, row, _KEYS, np.arange(self.seq_len // 2))
        tokens = np.full((len(row), self.seq_len), self.vocab_size - 1, np.int32)
        targets = np.full(tokens.shape, IGNORE, np.int32)
        tokens[:, ::2], targets[:, 1::2] = keys, facts[keys]
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle, which knows the map: at every odd position the value of the key before it, elsewhere -1."""
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, 1::2] = self.facts[tokens[:, ::2]]
        return answers
