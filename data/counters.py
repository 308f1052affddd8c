"""Counter languages a^n b^n, a^n b^n c^n, ...: which symbols may come next.

The sets that may come next, for n >= 1 and k symbols: a or b (n is still open), one of b, c, ... alone, or the end.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from engrax.data.config import DATASETS, require
from engrax.data.formal_language import FormalLanguage


@DATASETS.register("counters")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counters(FormalLanguage):
    """Counter languages: as many of each symbol as of the first."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "kinds")

    kinds: int = 2  # symbols, one block each

    def __post_init__(self):
        require(2 <= self.kinds <= 26, f"kinds of counters must lie in [2, 26], not {self.kinds}.")
        super().__post_init__()

    @property
    def step(self) -> int:
        """The blocks have equal lengths."""
        return self.kinds

    @property
    def symbols(self) -> int:
        """One per block."""
        return self.kinds

    @property
    def label_names(self) -> tuple[str, ...]:
        """The sets of symbols that may come next."""
        letters = [chr(ord("a") + i) for i in range(self.kinds)]
        return ("a or b", *letters[1:], "end")

    def _strings(self, keys, length):
        return np.minimum(np.arange(self.seq_len) // (length // self.kinds), self.kinds - 1)

    def _labels(self, strings):
        first = (strings == 0).cumsum(axis=1)
        labels = np.zeros_like(strings)
        for i in range(1, self.kinds):
            full = (strings == i).cumsum(axis=1) == first
            labels = np.where(strings == i, i + full, labels)
        return labels
