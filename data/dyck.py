"""Dyck-k: strings of balanced, nested brackets of k kinds, and which of them may come next.

Any bracket may open. The bracket that was opened last may close; where none is open, the string may end.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from engrax.data import hashing
from engrax.data.config import DATASETS, require
from engrax.data.formal_language import STRING, FormalLanguage, balanced
from engrax.data.task import earlier


@DATASETS.register("dyck")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Dyck(FormalLanguage):
    """Nested brackets of several kinds: which may close next."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "kinds")
    step: ClassVar[int] = 2

    kinds: int = 1  # of brackets

    def __post_init__(self):
        require(self.kinds >= 1, f"kinds of dyck must be at least 1, not {self.kinds}.")
        super().__post_init__()

    @property
    def symbols(self) -> int:
        """Opening brackets, then closing ones."""
        return 2 * self.kinds

    @property
    def label_names(self) -> tuple[str, ...]:
        """What may come next, besides an opening bracket."""
        return ("end", *(f"close {i}" for i in range(self.kinds)))

    def _strings(self, keys, length):
        opens = balanced(keys, length, self.seq_len)
        kind = hashing.integers(self.kinds, *keys, STRING, np.arange(self.seq_len))
        partner = earlier(_levels(opens), opens)
        return np.where(opens, kind, self.kinds + np.take_along_axis(kind, partner, axis=1))

    def _labels(self, strings):
        opens = (strings >= 0) & (strings < self.kinds)
        depth = _levels(opens) - ~opens
        last = np.where(opens, np.arange(self.seq_len), earlier(depth, opens))  # the innermost bracket that is open
        return np.where(depth > 0, 1 + np.take_along_axis(strings, last, axis=1), 0)


def _levels(opens):
    """The depth that an opening bracket reaches and a closing one leaves."""
    return np.where(opens, 1, -1).cumsum(axis=1) + ~opens
