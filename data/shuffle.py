"""Shuffle-k: balanced brackets of k kinds that need not nest with each other, and which of them may come next.

Any bracket may open, each kind of which one is open may close, and where none is open the string may end. A string
opens and closes as a balanced string of one kind; the kind that opens is uniform, the one that closes is that of an
open bracket drawn uniformly.
"""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np

from engrax.data import hashing
from engrax.data.config import DATASETS, require
from engrax.data.formal_language import STRING, FormalLanguage, balanced


@DATASETS.register("shuffle")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Shuffle(FormalLanguage):
    """Interleaved brackets of several kinds: which may close next."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "kinds")
    step: ClassVar[int] = 2

    kinds: int = 2  # of brackets

    def __post_init__(self):
        require(1 <= self.kinds <= 8, f"kinds of shuffle must lie in [1, 8], not {self.kinds}.")
        super().__post_init__()

    @property
    def symbols(self) -> int:
        """Opening brackets, then closing ones."""
        return 2 * self.kinds

    @property
    def label_names(self) -> tuple[str, ...]:
        """What may come next, besides an opening bracket: label i is the set of the bits of i."""
        sets = itertools.product((False, True), repeat=self.kinds)  # the first kind is the lowest bit
        closing = [[str(i) for i, used in enumerate(reversed(bits)) if used] for bits in sets]
        return ("end", *("close " + " or ".join(kinds) for kinds in closing[1:]))

    def _strings(self, keys, length):
        opens = balanced(keys, length, self.seq_len)
        draw = hashing.uniform(*keys, STRING, np.arange(self.seq_len))
        kinds, rows = np.empty(opens.shape, int), np.arange(len(opens))
        count = np.zeros((len(opens), self.kinds))
        for t in range(self.seq_len):
            up_to = np.where(opens[:, t, None], 1.0, count).cumsum(axis=1)
            kinds[:, t] = np.minimum((up_to <= draw[:, t, None] * up_to[:, -1:]).sum(axis=1), self.kinds - 1)
            count[rows, kinds[:, t]] += np.where(opens[:, t], 1, -1)
        return np.where(opens, kinds, self.kinds + kinds)

    def _labels(self, strings):
        labels = np.zeros_like(strings)
        for i in range(self.kinds):
            count = (strings == i).cumsum(axis=1) - (strings == self.kinds + i).cumsum(axis=1)
            labels += (count > 0) << i
        return labels
