"""MQAR with keys of two tokens: neither half alone determines the value.

From the generator of arXiv 2312.04927 (`compositional_mqar`). N = n^2 pairs, vocabulary V, third = V // 3:

    a_1 b_1 v_1 ... a_N b_N v_N  then the queries `a b` among filler tokens

n first halves of [1, third) and n second halves of [third, 2 third) form all n^2 keys, in random order, with N distinct
values of [2 third, V). The queries are in slots of three tokens, distributed as in MQAR; the target is at the second
half of the key. Filler is uniform in [0, V), or 0.
"""

import dataclasses
import math
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, choose, earlier, followers, query_slots
from engrax.data.token_types import TokenTypes

_FIRST, _SECOND, _ORDER, _VALUES, _SLOTS, _FILLER = range(6)  # the independent random streams of one example


@DATASETS.register("compositional_mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CompositionalMQAR(TaskConfig):
    """MQAR with keys of two tokens, of which neither alone determines the value."""

    axes: ClassVar[tuple[str, ...]] = ("num_pairs", "seq_len", "vocab_size")

    seq_len: int = 64  # tokens per row
    num_pairs: int = 9  # keys per row, a square number
    vocab_size: int = 128  # tokens; a third each are first halves of keys, second halves, and values
    power_a: float = 0.01  # exponent of the query slots' distribution; 1 is uniform, near 0 is early
    random_non_queries: bool = True  # fill positions between queries with uniform tokens instead of 0

    def __post_init__(self):
        super().__post_init__()
        side = math.isqrt(max(self.num_pairs, 0))
        require(
            side >= 1 and side**2 == self.num_pairs,
            f"num_pairs of compositional_mqar must be a square number (1, 4, 9, 16, ...), not {self.num_pairs}.",
        )
        third = self.vocab_size // 3
        require(
            side < third and self.num_pairs <= self.vocab_size - 2 * third,
            f"vocab_size {self.vocab_size} is too small for {self.num_pairs} pairs; choose at least "
            f"{3 * max(side + 1, self.num_pairs)}.",
        )
        require(
            6 * self.num_pairs <= self.seq_len,
            f"seq_len {self.seq_len} is too short for {self.num_pairs} pairs shown and asked once; it needs at least "
            f"{6 * self.num_pairs} tokens.",
        )
        require(self.power_a > 0, f"power_a must be positive, not {self.power_a}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens."""
        return 1.0 / (self.vocab_size - 2 * (self.vocab_size // 3))

    @property
    def chance_in_context(self) -> float:
        """Expected accuracy of guessing uniformly among the values shown in the row."""
        return 1.0 / self.num_pairs

    def token_types(self, batch: Batch) -> TokenTypes:
        """Halves of keys and values of the context, queries, and the filler between them."""
        place, asked = np.arange(self.seq_len), np.where(batch["targets"] != IGNORE, 3, 4)
        names = ("key, first half", "key, second half", "value", "query", "filler")
        return TokenTypes(names, np.where(place < 3 * self.num_pairs, place % 3, asked))

    def _examples(self, key, row):
        pairs, third, side = self.num_pairs, self.vocab_size // 3, math.isqrt(self.num_pairs)
        first = 1 + choose(hashing.bits(*key, row, _FIRST, np.arange(third - 1)), side)
        second = third + choose(hashing.bits(*key, row, _SECOND, np.arange(third)), side)
        cell = choose(hashing.bits(*key, row, _ORDER, np.arange(pairs)), pairs)  # of the grid, in the order of the row
        first = np.take_along_axis(first, cell // side, axis=1)
        second = np.take_along_axis(second, cell % side, axis=1)
        values = 2 * third + choose(hashing.bits(*key, row, _VALUES, np.arange(self.vocab_size - 2 * third)), pairs)
        filler = hashing.integers(self.vocab_size, *key, row, _FILLER, np.arange(self.seq_len))
        tokens = (filler if self.random_non_queries else np.zeros_like(filler)).astype(np.int32)
        tokens[:, : 3 * pairs] = np.stack([first, second, values], axis=-1).reshape(len(row), 3 * pairs)
        slots = query_slots((self.seq_len - 3 * pairs) // 3, pairs, self.power_a, *key, row, _SLOTS)
        targets = np.full(tokens.shape, IGNORE, np.int32)
        places = 3 * (pairs + slots)
        np.put_along_axis(tokens, places, first.astype(np.int32), axis=1)
        np.put_along_axis(tokens, places + 1, second.astype(np.int32), axis=1)
        np.put_along_axis(targets, places + 1, values.astype(np.int32), axis=1)
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: for every position the value of the key that its two last tokens form in the context, or -1."""
        codes = tokens.astype(np.int64)
        codes[:, 1:] += self.vocab_size * (1 + codes[:, :-1])
        place = np.arange(self.seq_len)
        in_context = (place < 3 * self.num_pairs) & (place % 3 == 1)
        return followers(tokens, earlier(codes, np.broadcast_to(in_context, tokens.shape)))
