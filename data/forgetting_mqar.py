"""MQAR with keys that are bound again: some keys get a second value, and the last one counts.

From the generator of arXiv 2312.04927 (`forgetting_mqar`). N pairs, U updates, vocabulary V, h = V // 2:

    k_1 v_1 ... k_N v_N  u_1 w_1 ... u_U w_U  then the queries among filler tokens, as in MQAR

The updated keys u are U of the N keys in random order. The target at each of the N queries is the value that was bound
last. All N + U values of a row are distinct, so an update never repeats a value (the published generator can).
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, choose, query_slots
from engrax.data.token_types import TokenTypes

_KEYS, _VALUES, _UPDATED, _SLOTS, _FILLER = range(5)  # the independent random streams of one example


@DATASETS.register("forgetting_mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class ForgettingMQAR(TaskConfig):
    """MQAR with keys that are bound again; the last value counts."""

    axes: ClassVar[tuple[str, ...]] = ("num_pairs", "num_updates", "seq_len", "vocab_size")

    seq_len: int = 64  # tokens per row
    num_pairs: int = 8  # keys per row
    num_updates: int = 4  # keys that are bound a second time
    vocab_size: int = 128  # tokens; the lower half are keys, the upper half values
    power_a: float = 0.01  # exponent of the query slots' distribution; 1 is uniform, near 0 is early

    def __post_init__(self):
        super().__post_init__()
        require(
            0 <= self.num_updates <= self.num_pairs and self.num_pairs >= 1,
            f"num_updates {self.num_updates} must lie in [0, num_pairs], and num_pairs {self.num_pairs} be positive.",
        )
        half, values = self.vocab_size // 2, self.num_pairs + self.num_updates
        require(
            self.num_pairs < half and values <= self.vocab_size - half,
            f"vocab_size {self.vocab_size} is too small for {self.num_pairs} keys and {values} values; choose at least "
            f"{max(2 * self.num_pairs + 2, 2 * values - 1)}.",
        )
        needed = 2 * (values + self.num_pairs)
        require(
            needed <= self.seq_len,
            f"seq_len {self.seq_len} is too short for {self.num_pairs} pairs, {self.num_updates} updates and "
            f"{self.num_pairs} queries; it needs at least {needed} tokens.",
        )
        require(self.power_a > 0, f"power_a must be positive, not {self.power_a}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens."""
        return 1.0 / (self.vocab_size - self.vocab_size // 2)

    @property
    def chance_in_context(self) -> float:
        """Expected accuracy of guessing uniformly among the values shown in the row."""
        return 1.0 / (self.num_pairs + self.num_updates)

    def token_types(self, batch: Batch) -> TokenTypes:
        """Keys and values of the context, those of updates, queries of updated and of untouched keys, and filler."""
        tokens, context = batch["tokens"], 2 * (self.num_pairs + self.num_updates)
        place, updates = np.arange(self.seq_len), tokens[:, 2 * self.num_pairs : context : 2]
        updated = (tokens[:, :, None] == updates[:, None]).any(axis=-1)
        asked = np.where(batch["targets"] == IGNORE, 6, np.where(updated, 4, 5))
        index = np.where(place < context, place % 2 + 2 * (place >= 2 * self.num_pairs), asked)
        return TokenTypes(("key", "value", "update: key", "update: value", "updated", "untouched", "filler"), index)

    def _examples(self, key, row):
        half, pairs, both = self.vocab_size // 2, self.num_pairs, self.num_pairs + self.num_updates
        keys = 1 + choose(hashing.bits(*key, row, _KEYS, np.arange(half - 1)), pairs)
        values = half + choose(hashing.bits(*key, row, _VALUES, np.arange(self.vocab_size - half)), both)
        updated = choose(hashing.bits(*key, row, _UPDATED, np.arange(pairs)), self.num_updates)
        tokens = hashing.integers(self.vocab_size, *key, row, _FILLER, np.arange(self.seq_len)).astype(np.int32)
        tokens[:, 0 : 2 * both : 2] = np.concatenate([keys, np.take_along_axis(keys, updated, axis=1)], axis=1)
        tokens[:, 1 : 2 * both : 2] = values
        answers = values[:, :pairs].copy()
        np.put_along_axis(answers, updated, values[:, pairs:], axis=1)
        places = 2 * both + 2 * query_slots((self.seq_len - 2 * both) // 2, pairs, self.power_a, *key, row, _SLOTS)
        targets = np.full(tokens.shape, IGNORE, np.int32)
        np.put_along_axis(tokens, places, keys.astype(np.int32), axis=1)
        np.put_along_axis(targets, places, answers.astype(np.int32), axis=1)
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: for every position the value bound last to its token in the context, or -1 without one."""
        rows = np.arange(len(tokens))[:, None]
        table = np.full((len(tokens), self.vocab_size), IGNORE, np.int32)
        for begin, end in ((0, self.num_pairs), (self.num_pairs, self.num_pairs + self.num_updates)):
            table[rows, tokens[:, 2 * begin : 2 * end : 2]] = tokens[:, 2 * begin + 1 : 2 * end : 2]
        return table[rows, tokens]
