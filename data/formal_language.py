"""The shared part of the formal languages: a row is one string, and every position is labelled.

A string's length is uniform among the language's lengths in [`shortest`, `seq_len`]; 0 fills the row after it. The
tokens [1, 1 + symbols) are the symbols; the tokens after them are the labels, which only targets use. The label of a
position is determined by the string up to it: for parity a bit, for the others the set of symbols that may come next.
As in Irie et al., "Practical Computational Power of Linear Transformers" (EMNLP 2023, with the languages of arXiv
2009.11264), a string counts as right only if all its positions are: `whole_rows`.
"""

import abc
import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from engrax.data import hashing
from engrax.data.config import IGNORE, Batch, require
from engrax.data.task import TaskConfig
from engrax.data.token_types import TokenTypes

_LENGTH, _WALK, STRING = range(3)  # the independent random streams of one example; a language adds to STRING


@dataclasses.dataclass(frozen=True, kw_only=True)
class FormalLanguage(TaskConfig):
    """Base of the formal languages. A subclass has `symbols`, `label_names`, `_strings` and `_labels`."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len",)
    whole_rows: ClassVar[bool] = True
    step: ClassVar[int] = 1  # lengths of strings are its multiples

    seq_len: int = 64  # tokens per row: the longest string
    shortest: int = 2  # symbols of the shortest string

    def __post_init__(self):
        super().__post_init__()
        require(
            1 <= self.shortest and self._lengths[0] <= self._lengths[1],
            f"{self.registered_name} has no string of {self.shortest} to {self.seq_len} symbols; lengths are multiples "
            f"of {self.step}.",
        )

    @property
    @abc.abstractmethod
    def symbols(self) -> int:
        """The size of the alphabet."""

    @property
    @abc.abstractmethod
    def label_names(self) -> tuple[str, ...]:
        """What each label says."""

    @abc.abstractmethod
    def _strings(self, keys: tuple, length: Int64[np.ndarray, "N 1"]) -> Int[np.ndarray, "N T"]:
        """Strings as numbers of symbols; what stands after `length` is not used. `keys`: of the random numbers."""

    @abc.abstractmethod
    def _labels(self, strings: Int[np.ndarray, "N T"]) -> Int[np.ndarray, "N T"]:
        """The label of every position, as a number; -1 in `strings` is after the end."""

    @property
    def vocab_size(self) -> int:
        """Tokens: filler, symbols and labels."""
        return 1 + self.symbols + len(self.label_names)

    @property
    def chance(self) -> float:
        """Expected accuracy per position of guessing uniformly among the labels."""
        return 1.0 / len(self.label_names)

    def token_types(self, batch: Batch) -> TokenTypes:
        """The labels by name, and filler."""
        answers = self.solve(batch["tokens"])
        index = np.where(answers == IGNORE, len(self.label_names), answers - 1 - self.symbols)
        return TokenTypes((*self.label_names, "filler"), index)

    @property
    def _lengths(self) -> tuple[int, int]:
        """The shortest and the longest length, in steps."""
        return -(-self.shortest // self.step), self.seq_len // self.step

    def _examples(self, key, row):
        least, most = self._lengths
        length = self.step * (least + hashing.integers(most - least + 1, *key, row, _LENGTH))
        strings = self._strings((*key, row), length)
        tokens = np.where(np.arange(self.seq_len) < length, 1 + strings, 0).astype(np.int32)
        return tokens, self.solve(tokens)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the label of every position of the string, -1 after its end."""
        labels = self._labels(tokens.astype(int) - 1)
        return np.where(tokens > 0, 1 + self.symbols + labels, IGNORE).astype(np.int32)


def balanced(keys: tuple, length: Int64[np.ndarray, "N 1"], seq_len: int) -> Bool[np.ndarray, "N T"]:
    """Returns where brackets open in balanced strings of even lengths, uniform among all of the length.

    At depth d with r symbols to come, (d + 2)(r - d) / (2 (d + 1) r) of the strings go on with an opening bracket.
    """
    opens = np.zeros((len(length), seq_len), bool)
    draw = hashing.uniform(*keys, _WALK, np.arange(seq_len))
    depth = np.zeros(len(length))
    for t in range(seq_len):
        left = np.maximum(length[:, 0] - t, 1)
        opens[:, t] = draw[:, t] * 2 * (depth + 1) * left < (depth + 2) * (left - depth)
        depth = np.where(length[:, 0] > t, depth + np.where(opens[:, t], 1, -1), 0)
    return opens
