"""In-context recall of MAD (arXiv 2403.17844): pairs of random keys and values; a key that returns keeps its value.

    k_1 v_1 k_2 v_2 ... k_n v_n

Of the V tokens, `noise_vocab` are noise and the others keys (lower half) and values (upper half). Keys are drawn with
replacement. A key's value is drawn when it is first seen and kept in the row. Each pair but the last is two noise
tokens with probability `noise`; one pair, at random, is never noise. The last key is one of those already shown.
The target at a key that was shown before is its value.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int, Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.task import TaskConfig, earlier, followers
from engrax.data.token_types import TokenTypes

_KEYS, _VALUES, _SHOWN, _PROTECTED, _LAST, _NOISE = range(6)  # the independent random streams of one example


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig(TaskConfig):
    """What MAD's recall tasks share: its sizes of the splits, and what its training predicts."""

    train_examples: int = 12_800  # rows of the train split
    validation_examples: int = 1_280  # rows of the validation split
    train_labels: Literal["answers", "all"] = "answers"  # of the train split; MAD predicts all next tokens

    def _labels(
        self, key: tuple[int, int], tokens: Int[np.ndarray, "N T"], answers: Int[np.ndarray, "N T"]
    ) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, "N T"]]:
        """Tokens and targets: the answers, or in a train split with `train_labels="all"` every next token."""
        if self.train_labels == "all" and key[1] == 0:
            answers = np.full_like(answers, IGNORE)
            answers[:, :-1] = tokens[:, 1:]
        return tokens.astype(np.int32), answers.astype(np.int32)


@DATASETS.register("in_context_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class InContextRecall(RecallConfig):
    """MAD's in-context recall: keys that return, each with its value."""

    axes: ClassVar[tuple[str, ...]] = ("vocab_size", "seq_len", "noise", "train_examples")

    seq_len: int = 128  # tokens per row
    vocab_size: int = 16  # tokens: keys, values and noise
    noise_vocab: int = 0  # tokens that are noise
    noise: float = 0.0  # probability that a pair is noise

    def __post_init__(self):
        super().__post_init__()
        require(
            self.seq_len % 2 == 0 and self.seq_len >= 4,
            f"seq_len of {self.registered_name} must be even and at least 4, not {self.seq_len}.",
        )
        require(
            0 <= self.noise_vocab <= self.vocab_size - 2,
            f"vocab_size {self.vocab_size} with noise_vocab {self.noise_vocab} has no key and value; keep 2 tokens.",
        )
        require(
            0 <= self.noise < 1 and (self.noise_vocab > 0 or not self.noise),
            f"noise {self.noise} must lie in [0, 1), and above 0 it needs a noise_vocab of at least 1, not "
            f"{self.noise_vocab}.",
        )

    @property
    def _ranges(self) -> tuple[int, int]:
        """(number of keys, number of keys and values): where the ranges of tokens end."""
        ordinary = self.vocab_size - self.noise_vocab
        return ordinary // 2, ordinary

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens."""
        keys, ordinary = self._ranges
        return 1.0 / (ordinary - keys)

    def token_types(self, batch: Batch) -> TokenTypes:
        """Keys at their first place, keys that return, values and noise."""
        tokens, (keys, ordinary) = batch["tokens"], self._ranges
        index = np.select([tokens >= ordinary, tokens >= keys, self.solve(tokens) != IGNORE], [3, 2, 1], 0)
        return TokenTypes(("new key", "repeated key", "value", "noise"), index)

    def _examples(self, key, row):
        pairs, (keys, ordinary) = self.seq_len // 2, self._ranges
        keys_shown = hashing.integers(keys, *key, row, _KEYS, np.arange(pairs))
        shown = hashing.uniform(*key, row, _SHOWN, np.arange(pairs)) >= self.noise
        shown |= np.arange(pairs) == hashing.integers(pairs - 1, *key, row, _PROTECTED)
        shown[:, -1] = True
        rows, places = np.nonzero(shown[:, :-1])
        known = np.zeros((len(row), keys), bool)
        known[rows, keys_shown[rows, places]] = True
        keys_shown[:, -1] = np.argmax(known * hashing.uniform(*key, row, _LAST, np.arange(keys)), axis=1)
        values = keys + hashing.integers(ordinary - keys, *key, row, _VALUES, keys_shown)  # a function of row and key
        tokens = np.stack([keys_shown, values], axis=-1).reshape(len(row), self.seq_len)
        if self.noise:
            noise = ordinary + hashing.integers(self.noise_vocab, *key, row, _NOISE, np.arange(self.seq_len))
            tokens = np.where(np.repeat(shown, 2, axis=1), tokens, noise)
        answers = np.full(tokens.shape, IGNORE)
        answers[:, ::2] = np.where(shown & (earlier(keys_shown, shown) >= 0), values, IGNORE)
        return self._labels(key, tokens, answers)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: at every key the token that followed it before, elsewhere and at new keys -1."""
        return followers(tokens, earlier(tokens, tokens < self._ranges[0]))
