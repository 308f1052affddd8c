"""Bit patterns: a multiple-instance task (arXiv 2008.02217, from the examples of its code).

A bag holds n instances of b bits. S patterns, drawn once, are signals. A positive bag holds `signals_per_bag` of them
(distinct while there are enough) at random positions. All other instances, in both kinds of bag, are drawn uniformly
from the remaining patterns. Half of the bags are positive. A model learns the signals from the labels of bags only.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Int8, Int64

from engrax.data import hashing
from engrax.data.config import SPLITS, require

_SIGNALS, _LABEL, _FILLER, _WHICH, _WHERE = range(5)  # the independent random streams


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitPatterns:
    """Bags of bit patterns, generated: bag i of a split is a pure function of (seed, split, i)."""

    instances: int = 16  # patterns in a bag
    bits: int = 8  # of a pattern
    signals: int = 8  # number of signals among the 2 ** bits patterns
    signals_per_bag: int = 1  # signals in a positive bag
    train_examples: int = 2048  # bags of the train split
    validation_examples: int = 512  # bags of the validation split
    seed: int = 0

    def __post_init__(self):
        require(1 <= self.bits <= 16, f"bits must lie in [1, 16], not {self.bits}.")
        require(1 <= self.signals < 2**self.bits, f"signals must lie in [1, 2 ** bits), not {self.signals}.")
        most = min(self.instances, self.signals)
        require(
            1 <= self.signals_per_bag <= most, f"signals_per_bag must lie in [1, {most}], not {self.signals_per_bag}."
        )

    @property
    def chance(self) -> float:
        """Accuracy of a guess that ignores the bag."""
        return 0.5

    def num_examples(self, split: str) -> int:
        """Returns the number of bags of a split."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        return self.train_examples if split == "train" else self.validation_examples

    @property
    def codes(self) -> tuple[Int64[np.ndarray, " S"], Int64[np.ndarray, " R"]]:
        """The signals and the other patterns, as integers."""
        order = hashing.permutation(2**self.bits, self.seed, _SIGNALS)
        return order[: self.signals], order[self.signals :]

    def generate(
        self, split: str, indices: Int64[np.ndarray, " N"]
    ) -> tuple[Int8[np.ndarray, "N instances bits"], Bool[np.ndarray, " N"]]:
        """Returns bags of bits and their labels, for any subset in any order, without state."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        bag = np.asarray(indices, np.int64)[:, None]
        key = (self.seed, 1 + SPLITS.index(split), bag)
        signals, others = self.codes
        filler = others[(hashing.bits(*key, _FILLER, np.arange(self.instances)) % np.uint64(len(others))).astype(int)]
        which = np.argsort(hashing.bits(*key, _WHICH, np.arange(self.signals)), axis=1)[:, : self.signals_per_bag]
        where = np.argsort(hashing.bits(*key, _WHERE, np.arange(self.instances)), axis=1)[:, : self.signals_per_bag]
        positive = filler.copy()
        np.put_along_axis(positive, where, signals[which], axis=1)
        label = (hashing.bits(*key, _LABEL) & np.uint64(1)).astype(bool)
        codes = np.where(label, positive, filler)
        return (codes[..., None] >> np.arange(self.bits) & 1).astype(np.int8), label[:, 0]

    def solve(self, bags: Int8[np.ndarray, "N instances bits"]) -> Bool[np.ndarray, " N"]:
        """The oracle, which knows the signals: whether each bag holds one. It scores 100 %."""
        codes = np.sum(bags.astype(np.int64) << np.arange(self.bits), axis=-1)
        return np.isin(codes, self.codes[0]).any(axis=1)
