"""Multi-query associative recall (MQAR): a context of key-value pairs, then one query per key.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927, and its
published generator. One row of T tokens, N pairs, vocabulary V, h = V // 2:

    k_1 v_1 k_2 v_2 ... k_N v_N  (the context, `num_passes` times)  then the queries among filler tokens

Keys are N distinct tokens of [1, h), values N distinct tokens of [h, V). The context of C = 2 N num_passes tokens is
followed by S = (T - C) // 2 slots of two tokens. Key j is in slot g_j (position C + 2 g_j). Slots are drawn without
replacement, with probability proportional to a i^(a - 1) for the i-th slot, i = 1..S (a = 1 is uniform, a = 0.01 puts
the queries early). The target at the position of the query key is its value, elsewhere -1. The value is not shown
there: the other tokens are uniform in [0, V), or 0.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, choose, query_slots
from engrax.data.token_types import TokenTypes

_KEYS, _VALUES, _SLOTS, _FILLER = range(4)  # the independent random streams of one example


@DATASETS.register("mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(TaskConfig):
    """Multi-query associative recall, generated."""

    axes: ClassVar[tuple[str, ...]] = ("num_pairs", "seq_len", "vocab_size")

    seq_len: int = 64  # tokens per row
    num_pairs: int = 4  # key-value pairs per row
    vocab_size: int = 128  # tokens; the lower half are keys, the upper half values
    power_a: float = 0.01  # exponent of the query slots' distribution; 1 is uniform, near 0 is early
    random_non_queries: bool = True  # fill positions between queries with uniform tokens instead of 0
    num_passes: int = 1  # times the context is shown

    def __post_init__(self):
        super().__post_init__()
        half = self.vocab_size // 2
        require(self.num_pairs >= 1, f"num_pairs must be at least 1, not {self.num_pairs}.")
        require(self.num_passes >= 1, f"num_passes must be at least 1, not {self.num_passes}.")
        require(self.seq_len % 2 == 0, f"seq_len of MQAR must be even, not {self.seq_len}.")
        require(
            self.num_pairs <= half - 1,
            f"vocab_size {self.vocab_size} has {max(half - 1, 0)} keys, too few for num_pairs {self.num_pairs}; "
            f"choose a vocab_size of at least {2 * self.num_pairs + 2}.",
        )
        needed = 2 * self.num_pairs * (self.num_passes + 1)
        require(
            needed <= self.seq_len,
            f"seq_len {self.seq_len} is too short for {self.num_pairs} pairs shown {self.num_passes} time(s) and asked "
            f"once; it needs at least {needed} tokens.",
        )
        require(self.power_a > 0, f"power_a must be positive, not {self.power_a}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens: 1 / (vocab_size - vocab_size // 2)."""
        return 1.0 / (self.vocab_size - self.vocab_size // 2)

    @property
    def chance_in_context(self) -> float:
        """Expected accuracy of guessing uniformly among the values shown in the row: 1 / num_pairs.

        A model between `chance` and this value knows which tokens are answers, but does not bind keys to values.
        """
        return 1.0 / self.num_pairs

    def token_types(self, batch: Batch) -> TokenTypes:
        """Keys and values of the context, queries, and the filler between them."""
        place = np.arange(self.seq_len)
        asked = np.where(batch["targets"] != IGNORE, 2, 3)
        in_context = place < 2 * self.num_pairs * self.num_passes
        return TokenTypes(("key", "value", "query", "filler"), np.where(in_context, place % 2, asked))

    def _examples(self, key, row):
        half, context = self.vocab_size // 2, 2 * self.num_pairs * self.num_passes
        keys = 1 + choose(hashing.bits(*key, row, _KEYS, np.arange(half - 1)), self.num_pairs)
        values = half + choose(hashing.bits(*key, row, _VALUES, np.arange(self.vocab_size - half)), self.num_pairs)
        slots = query_slots((self.seq_len - context) // 2, self.num_pairs, self.power_a, *key, row, _SLOTS)
        shape = (len(row), self.seq_len)
        if self.random_non_queries:
            filler = hashing.bits(*key, row, _FILLER, np.arange(self.seq_len))
            tokens = (filler % np.uint64(self.vocab_size)).astype(np.int32)
        else:
            tokens = np.zeros(shape, np.int32)
        pairs = np.stack([keys, values], axis=-1).reshape(len(row), 2 * self.num_pairs)
        tokens[:, :context] = np.tile(pairs, self.num_passes)
        targets = np.full(shape, IGNORE, np.int32)
        np.put_along_axis(tokens, context + 2 * slots, keys.astype(np.int32), axis=1)
        np.put_along_axis(targets, context + 2 * slots, values.astype(np.int32), axis=1)
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: for every position the value bound to its token in the context, or -1 without one.

        It reads only the tokens and scores 100 % on the labelled positions.
        """
        rows = np.arange(len(tokens))[:, None]
        table = np.full((len(tokens), self.vocab_size), IGNORE, np.int32)
        table[rows, tokens[:, 0 : 2 * self.num_pairs : 2]] = tokens[:, 1 : 2 * self.num_pairs : 2]
        return table[rows, tokens]
