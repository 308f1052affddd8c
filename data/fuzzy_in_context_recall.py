"""Fuzzy in-context recall of MAD (arXiv 2403.17844): keys and values are motifs of one to three tokens.

    PAD ... PAD  K_1 V_1 K_2 V_2 ... K_n V_n  K_j V_j

K_i is a motif of 1 to `key_size` distinct key tokens, V_i of 1 to `value_size` distinct value tokens; sizes and motifs
are uniform. In the validation split all keys have `key_size` tokens. A key's value is drawn when it is first seen and
kept in the row. As many pairs as surely fit come before the last one, which repeats one of them; padding comes first.
Of the V tokens, V - 1 is PAD, and the others are keys (lower half) and values (upper half). The target before each
token of the value of a repeated key is that token.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.in_context_recall import RecallConfig
from engrax.data.task import earlier, followers

_KEY_SIZES, _KEYS, _VALUE_SIZES, _VALUES, _LAST = range(5)  # the independent random streams of one example


@DATASETS.register("fuzzy_in_context_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FuzzyInContextRecall(RecallConfig):
    """MAD's fuzzy in-context recall: keys and values of one to three tokens."""

    axes: ClassVar[tuple[str, ...]] = ("vocab_size", "seq_len", "key_size", "value_size", "train_examples")

    seq_len: int = 128  # tokens per row
    vocab_size: int = 16  # tokens: keys, values and PAD
    key_size: int = 3  # most tokens of a key
    value_size: int = 3  # most tokens of a value

    def __post_init__(self):
        super().__post_init__()
        require(min(self.key_size, self.value_size) >= 1, "key_size and value_size must be at least 1.")
        keys = (self.vocab_size - 1) // 2
        require(
            self.key_size <= keys and self.value_size <= self.vocab_size - 1 - keys,
            f"vocab_size {self.vocab_size} is too small for keys of {self.key_size} and values of {self.value_size} "
            f"distinct tokens; choose at least {1 + 2 * max(self.key_size, self.value_size)}.",
        )
        needed = 2 * (self.key_size + self.value_size)
        require(self.seq_len >= needed, f"seq_len {self.seq_len} is too short for two pairs; it needs {needed} tokens.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens."""
        return 1.0 / (self.vocab_size - 1 - (self.vocab_size - 1) // 2)

    def _examples(self, key, row):
        keys, pairs, most = (self.vocab_size - 1) // 2, self.seq_len // 2, self.key_size + self.value_size
        sizes = 1 + hashing.integers(self.key_size, *key, row, _KEY_SIZES, np.arange(pairs))
        if key[1] == 1:
            sizes = np.full_like(sizes, self.key_size)
        k = _motifs(keys, self.key_size, *key, row, _KEYS, at=np.arange(pairs))
        codes = _code(np.where(np.arange(self.key_size) < sizes[..., None], k, IGNORE), keys)
        value_sizes = 1 + hashing.integers(self.value_size, *key, row, _VALUE_SIZES, codes)  # a function of the key
        v = keys + _motifs(self.vocab_size - 1 - keys, self.value_size, *key, row, _VALUES, at=codes)

        count = ((sizes + value_sizes).cumsum(axis=1) <= self.seq_len - most).sum(axis=1, keepdims=True)
        place, probe = np.arange(pairs), (count * hashing.uniform(*key, row, _LAST)).astype(int)
        source = np.where(place == count, probe, place)  # the pair at each place of the row
        sizes, value_sizes, codes = (np.take_along_axis(x, source, axis=1) for x in (sizes, value_sizes, codes))
        kept = place <= count
        repeated = kept & (earlier(codes, kept) >= 0)
        length = np.where(kept, sizes + value_sizes, 0)
        start = self.seq_len - length.sum(axis=1, keepdims=True) + length.cumsum(axis=1) - length
        tokens = np.full((len(row), self.seq_len), self.vocab_size - 1)
        answers = np.full(tokens.shape, IGNORE)
        for i in range(self.key_size):
            rows, at = np.nonzero(kept & (i < sizes))
            tokens[rows, start[rows, at] + i] = k[rows, source[rows, at], i]
        for i in range(self.value_size):
            rows, at = np.nonzero(kept & (i < value_sizes))
            where, token = start[rows, at] + sizes[rows, at] + i, v[rows, source[rows, at], i]
            tokens[rows, where] = token
            answers[rows, where - 1] = np.where(repeated[rows, at], token, IGNORE)
        return self._labels(key, tokens, answers)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: at every position the value token that came next when the key had been shown before, or -1.

        Its code of a position is the current key's tokens so far and the number of value tokens since.
        """
        keys, place = (self.vocab_size - 1) // 2, np.arange(self.seq_len)
        is_key, is_value = tokens < keys, (tokens >= keys) & (tokens < self.vocab_size - 1)
        begins, value_next = is_key.copy(), np.zeros_like(is_key)
        begins[:, 1:] &= ~is_key[:, :-1]
        value_next[:, :-1] = is_value[:, 1:]
        start = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        end = np.maximum.accumulate(np.where(is_key, place, 0), axis=1)
        at = start[..., None] + np.arange(self.key_size)
        motif = tokens[np.arange(len(tokens))[:, None, None], np.minimum(at, self.seq_len - 1)]
        codes = _code(np.where(at <= end[..., None], motif, IGNORE), keys) * (self.value_size + 1) + (place - end)
        return followers(tokens, earlier(codes, value_next))


def _motifs(count: int, size: int, *keys, at: Int[np.ndarray, "..."]) -> Int[np.ndarray, "... size"]:
    """Motifs of `size` distinct tokens of [0, count), one per element of `at`: all orders are equally likely."""
    drawn = np.stack([hashing.integers(count - i, *keys, i, at) for i in range(size)], axis=-1)
    for i in reversed(range(size)):  # a place among the tokens that the earlier ones, still places, leave
        for j in reversed(range(i)):
            drawn[..., i] += drawn[..., i] >= drawn[..., j]
    return drawn


def _code(motif: Int[np.ndarray, "... size"], count: int) -> Int[np.ndarray, "..."]:
    """A motif of tokens of [0, count), filled up with -1, as one number."""
    return ((motif + 1) * (count + 1) ** np.arange(motif.shape[-1])).sum(axis=-1)
