"""Set intersection, the recall task of "Just read twice" (arXiv 2407.05483): find the common element of two sets.

    a_1 ... a_m SEP b_1 ... b_n ASK        target at ASK: the one element of both sets

If the smaller set comes first, a model need only remember that one; if the larger comes first, it must remember the
larger one. The order therefore hurts a causal memory of fixed size, and much less a model that reads the whole context,
or reads it twice (`num_passes=2`, JRT-Prompt: each pass except the last ends with SEP).
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, choose
from engrax.data.token_types import TokenTypes

SEP, ASK = 0, 1  # every other token is an element
_ELEMENTS, _SHARED, _PLACE, _ORDER = range(4)  # the independent random streams of one example


@DATASETS.register("set_disjointness")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SetDisjointness(TaskConfig):
    """Two sets with one common element, the answer."""

    axes: ClassVar[tuple[str, ...]] = ("small", "large")

    seq_len: int = 30  # tokens per row: num_passes (small + large + 2)
    small: int = 4  # elements of the smaller set
    large: int = 24  # elements of the larger set
    vocab_size: int = 128  # tokens: SEP, ASK and the elements
    order: Literal["random", "small_first", "large_first"] = "random"  # of the two sets in the row
    num_passes: int = 1  # times the two sets are shown

    def __post_init__(self):
        super().__post_init__()
        require(1 <= self.small <= self.large, f"small={self.small} must lie in [1, large={self.large}].")
        require(self.num_passes >= 1, f"num_passes must be at least 1, not {self.num_passes}.")
        needed = self.num_passes * (self.small + self.large + 2)
        require(
            self.seq_len == needed,
            f"seq_len {self.seq_len} does not fit sets of {self.small} and {self.large} shown {self.num_passes} "
            f"time(s); set it to {needed}.",
        )
        least = self.small + self.large + 1
        require(self.vocab_size >= least, f"vocab_size {self.vocab_size} has too few elements; it needs {least}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing among all elements."""
        return 1.0 / (self.vocab_size - 2)

    @property
    def chance_in_context(self) -> float:
        """Expected accuracy of guessing among the elements of the smaller set."""
        return 1.0 / self.small

    def token_types(self, batch: Batch) -> TokenTypes:
        """Elements of the first and of the second set in the row, the end of each, and the question."""
        tokens = batch["tokens"]
        first = np.argmax(tokens == SEP, axis=1)[:, None]  # elements of the first set
        in_pass = np.arange(self.seq_len) % (self.small + self.large + 2)
        index = np.select([tokens == ASK, tokens == SEP, in_pass < first], [3, 2, 0], 1)
        return TokenTypes(("first set", "second set", "end of a set", "question"), index)

    def _examples(self, key, row):
        total = self.small + self.large - 1
        drawn = 2 + choose(hashing.bits(*key, row, _ELEMENTS, np.arange(self.vocab_size - 2)), total)
        small, large = drawn[:, : self.small], drawn[:, self.small :]
        shared = (hashing.bits(*key, row, _SHARED) % np.uint64(self.small)).astype(int)
        answer = np.take_along_axis(small, shared, axis=1)
        place = (hashing.bits(*key, row, _PLACE) % np.uint64(self.large)).astype(int)
        at = np.arange(self.large)
        padded = np.concatenate([large, answer], axis=1)  # as wide as the larger set
        large = np.where(at == place, answer, np.take_along_axis(padded, at - (at > place), axis=1))
        first = self._small_first(key, row)
        end = np.full_like(answer, SEP)
        one_pass = np.where(
            first,
            np.concatenate([small, end, large, end], axis=1),
            np.concatenate([large, end, small, end], axis=1),
        )
        tokens = np.tile(one_pass, self.num_passes).astype(np.int32)
        tokens[:, -1] = ASK
        targets = np.full(tokens.shape, IGNORE, np.int32)
        targets[:, -1:] = answer
        return tokens, targets

    def _small_first(self, key, row):
        if self.order == "random":
            return hashing.bits(*key, row, _ORDER) % np.uint64(2) == 0
        return np.full((len(row), 1), self.order == "small_first")

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: at every position, the element that occurs twice in the row's first pass."""
        shown = tokens[:, : self.small + self.large + 1]
        count = np.zeros((len(tokens), self.vocab_size), int)
        np.add.at(count, (np.arange(len(tokens))[:, None], shown), 1)
        count[:, SEP] = 0
        return np.broadcast_to(count.argmax(axis=1)[:, None], tokens.shape).astype(np.int32)
