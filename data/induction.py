"""Induction heads, in the form of Mamba (arXiv 2312.00752): what followed the trigger before?

    random tokens  TRIGGER x  random tokens  TRIGGER        target at the last position: x

TRIGGER is 0 and occurs exactly twice; its first place is uniform. The other tokens are uniform in [1, V). The paper
trains on 256 tokens and evaluates on 64 to 1,048,576.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.task import TaskConfig

TRIGGER = 0
_TOKENS, _PLACE = range(2)  # the independent random streams of one example


@DATASETS.register("induction")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Induction(TaskConfig):
    """Induction heads: the token that followed the trigger before."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "vocab_size")

    seq_len: int = 64  # tokens per row
    vocab_size: int = 16  # tokens: TRIGGER and the others

    def __post_init__(self):
        super().__post_init__()
        require(self.seq_len >= 3, f"seq_len of induction must be at least 3, not {self.seq_len}.")
        require(self.vocab_size >= 2, f"vocab_size must be at least 2, not {self.vocab_size}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the ordinary tokens."""
        return 1.0 / (self.vocab_size - 1)

    def _examples(self, key, row):
        tokens = 1 + hashing.integers(self.vocab_size - 1, *key, row, _TOKENS, np.arange(self.seq_len)).astype(np.int32)
        place = hashing.integers(self.seq_len - 2, *key, row, _PLACE)
        np.put_along_axis(tokens, place, TRIGGER, axis=1)
        tokens[:, -1] = TRIGGER
        targets = np.full(tokens.shape, IGNORE, np.int32)
        targets[:, -1:] = np.take_along_axis(tokens, place + 1, axis=1)
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: at the last position the token after the first TRIGGER; elsewhere -1."""
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, -1] = tokens[np.arange(len(tokens)), np.argmax(tokens == TRIGGER, axis=1) + 1]
        return answers
