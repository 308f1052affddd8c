"""Associative retrieval of ARMT (arXiv 2407.04841): segments of a key and a value, then one key is asked.

    K_1 SEP v_1 EOS  K_2 SEP v_2 EOS ...  K_n SEP v_n EOS  K GEN        target at GEN: the value bound last to K

A key is `key_size` symbols, a value one symbol. With `keys="rewritten"` keys are drawn with replacement, and the asked
key is uniform among those that occur; with `keys="distinct"` all are different. Tokens: 0 fills the row after GEN, SEP
is 1, GEN 2, EOS 3, the rest are symbols. The paper also asks for the EOS after the value, which is always the same.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, choose, earlier
from engrax.data.token_types import TokenTypes

SEP, GEN, EOS = 1, 2, 3
MOST_KEYS = 2**16  # that are shuffled for every row
_KEYS, _VALUES, _ASKED = range(3)  # the independent random streams of one example


@DATASETS.register("associative_retrieval")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AssociativeRetrieval(TaskConfig):
    """ARMT's associative retrieval, with keys that are rewritten."""

    axes: ClassVar[tuple[str, ...]] = ("num_pairs", "key_size", "seq_len")

    seq_len: int = 64  # tokens per row
    num_pairs: int = 15  # segments of a key and a value
    key_size: int = 1  # symbols of a key
    vocab_size: int = 20  # tokens: four marks and the symbols
    keys: Literal["rewritten", "distinct"] = "rewritten"  # whether keys occur again with another value
    train_examples: int = 10_000  # rows of the train split

    def __post_init__(self):
        super().__post_init__()
        require(self.vocab_size >= 5, f"vocab_size must be at least 5, not {self.vocab_size}.")
        require(min(self.num_pairs, self.key_size) >= 1, "num_pairs and key_size must be at least 1.")
        needed = self._asked + 1
        require(
            needed <= self.seq_len,
            f"seq_len {self.seq_len} is too short for {self.num_pairs} pairs with keys of {self.key_size}; it needs at "
            f"least {needed} tokens.",
        )
        possible = (self.vocab_size - 4) ** self.key_size
        require(possible < 2**62, f"{self.vocab_size - 4} symbols make too many keys of {self.key_size}.")
        require(
            self.keys == "rewritten" or self.num_pairs <= possible <= MOST_KEYS,
            f"{self.vocab_size - 4} symbols make {possible} keys of {self.key_size}; {self.num_pairs} distinct ones "
            f"need between {self.num_pairs} and {MOST_KEYS}.",
        )

    @property
    def _asked(self) -> int:
        """The position of GEN."""
        return self.num_pairs * (self.key_size + 3) + self.key_size

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the symbols."""
        return 1.0 / (self.vocab_size - 4)

    def token_types(self, batch: Batch) -> TokenTypes:
        """Keys, values, marks, the question about a rewritten key or about one bound once, and filler."""
        place, width = np.arange(self.seq_len), self.key_size + 3
        part = np.select([place % width < self.key_size, place % width == self.key_size + 1], [0, 1], 2)
        part = np.select([place > self._asked, place >= width * self.num_pairs], [5, 0], part)
        index = np.tile(part, (len(batch["tokens"]), 1))
        index[:, self._asked] = np.where(self._bound(batch["tokens"]).sum(axis=1) > 1, 3, 4)
        return TokenTypes(("key", "value", "mark", "rewritten", "bound once", "filler"), index)

    def _examples(self, key, row):
        symbols, pairs, digit = self.vocab_size - 4, self.num_pairs, np.arange(self.key_size)
        if self.keys == "distinct":
            keys = choose(hashing.bits(*key, row, _KEYS, np.arange(symbols**self.key_size)), pairs)
        else:
            keys = hashing.integers(symbols**self.key_size, *key, row, _KEYS, np.arange(pairs))
        last = earlier(keys[:, ::-1])[:, ::-1] < 0  # no later segment has the same key
        asked = np.argmax(last * hashing.uniform(*key, row, _ASKED, np.arange(pairs)), axis=1)[:, None]
        values = 4 + hashing.integers(symbols, *key, row, _VALUES, np.arange(pairs))
        written = 4 + keys[..., None] // symbols**digit % symbols
        marks = np.broadcast_to([SEP, 0, EOS], (len(row), pairs, 3)).copy()
        marks[..., 1] = values
        segments = np.concatenate([written, marks], axis=-1).reshape(len(row), pairs * (self.key_size + 3))
        tokens = np.zeros((len(row), self.seq_len), np.int32)
        tokens[:, : segments.shape[1]] = segments
        tokens[:, segments.shape[1] : self._asked] = np.take_along_axis(written, asked[..., None], axis=1)[:, 0]
        tokens[:, self._asked] = GEN
        targets = np.full(tokens.shape, IGNORE, np.int32)
        targets[:, self._asked : self._asked + 1] = np.take_along_axis(values, asked, axis=1)
        return tokens, targets

    def _bound(self, tokens):
        """[B, pairs]: whether a segment has the key that is asked."""
        width = self.key_size + 3
        segments = tokens[:, : self.num_pairs * width].reshape(len(tokens), self.num_pairs, width)
        asked = tokens[:, None, self._asked - self.key_size : self._asked]
        return (segments[..., : self.key_size] == asked).all(axis=-1)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: at GEN the value of the last segment that has the key before it; elsewhere -1."""
        last = self.num_pairs - 1 - np.argmax(self._bound(tokens)[:, ::-1], axis=1)
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, self._asked] = tokens[np.arange(len(tokens)), last * (self.key_size + 3) + self.key_size + 1]
        return answers
