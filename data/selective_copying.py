"""Selective copying, in the forms of MAD (arXiv 2403.17844) and of Mamba (arXiv 2312.00752).

    mad:    blanks and x_1 ... x_n  COPY  blank_1 ... blank_n       target at blank_i: x_i
    mamba:  blanks and x_1 ... x_n  COPY_1 ... COPY_n               target at COPY_i: x_i

The x are uniform in [0, V - 2); V - 2 is the blank and V - 1 COPY. In MAD's form every blank is put before an x drawn
uniformly, so that x_n directly precedes COPY. In Mamba's form all sets of n places are equally likely.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, choose
from engrax.data.token_types import TokenTypes

_TOKENS, _PLACES = range(2)  # the independent random streams of one example


@DATASETS.register("selective_copying")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(TaskConfig):
    """Copying the tokens between blanks, in MAD's or Mamba's form."""

    axes: ClassVar[tuple[str, ...]] = ("num_tokens", "seq_len", "vocab_size", "train_examples")

    seq_len: int = 256  # tokens per row
    num_tokens: int = 16  # tokens to copy
    vocab_size: int = 16  # tokens: those to copy, the blank and COPY
    form: Literal["mad", "mamba"] = "mad"
    train_examples: int = 12_800  # rows of the train split
    validation_examples: int = 1_280  # rows of the validation split

    def __post_init__(self):
        super().__post_init__()
        needed = 2 * self.num_tokens + (self.form == "mad")
        require(
            1 <= self.num_tokens and needed <= self.seq_len,
            f"seq_len {self.seq_len} is too short to show and copy {self.num_tokens} tokens; it needs at least "
            f"{max(needed, 2)}.",
        )
        require(self.vocab_size >= 3, f"vocab_size must be at least 3, not {self.vocab_size}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the tokens to copy."""
        return 1.0 / (self.vocab_size - 2)

    def token_types(self, batch: Batch) -> TokenTypes:
        """Tokens to copy, blanks, COPY, and the places of the answers."""
        tokens = batch["tokens"]
        index = np.select([np.arange(self.seq_len) >= self.seq_len - self.num_tokens, tokens < self.vocab_size - 2],
                          [3, 0], tokens - self.vocab_size + 3)  # fmt: skip
        return TokenTypes(("token to copy", "blank", "COPY", "answer"), index)

    def _examples(self, key, row):
        n, rows = self.num_tokens, np.arange(len(row))[:, None]
        if self.form == "mad":
            before = hashing.integers(n, *key, row, _PLACES, np.arange(self.seq_len - 2 * n - 1))
            blanks = np.bincount((before + n * rows).ravel(), minlength=n * len(row)).reshape(len(row), n)
            places = np.arange(n) + blanks.cumsum(axis=1)
        else:
            places = np.sort(choose(hashing.bits(*key, row, _PLACES, np.arange(self.seq_len - n)), n), axis=1)
        drawn = hashing.integers(self.vocab_size - 2, *key, row, _TOKENS, np.arange(n))
        tokens = np.full((len(row), self.seq_len), self.vocab_size - 2, np.int32)
        targets = np.full(tokens.shape, IGNORE, np.int32)
        tokens[rows, places], targets[:, -n:] = drawn, drawn
        tokens[:, slice(-n - 1, -n) if self.form == "mad" else slice(-n, None)] = self.vocab_size - 1
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the row's tokens that are neither blank nor COPY, at its last positions; elsewhere -1."""
        places = np.argsort(tokens >= self.vocab_size - 2, axis=1, kind="stable")[:, : self.num_tokens]
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, -self.num_tokens :] = np.take_along_axis(tokens, places, axis=1)
        return answers
