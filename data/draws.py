"""Draws one after another from a few integer keys, for examples that are built as text (`engrax.data.hashing`)."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from engrax.data import hashing
from engrax.data.config import require

_BLOCK = 64  # numbers computed at once

T = TypeVar("T")


class Draws:
    """A stream of random numbers, the same on every machine and version for the same keys."""

    def __init__(self, *keys: int):
        self._keys, self._block, self._left = keys, 0, []

    def bits(self) -> int:
        """64 random bits."""
        if not self._left:
            self._left = hashing.bits(*self._keys, self._block, np.arange(_BLOCK)).tolist()
            self._block += 1
        return self._left.pop()

    def below(self, count: int) -> int:
        """A uniform integer in [0, count)."""
        return self.bits() % count

    def choice(self, items: Sequence[T]) -> T:
        """A uniform item."""
        return items[self.below(len(items))]

    def letters(self, alphabet: str, count: int) -> str:
        """A word of uniform letters; they are digits of one number, so at most 13 of 26."""
        number, word = self.bits(), ""
        for _ in range(count):
            number, place = divmod(number, len(alphabet))
            word += alphabet[place]
        return word

    def sample(self, count: int, size: int) -> list[int]:
        """`size` distinct integers of [0, count), in random order. Raises UserError if there are fewer."""
        require(size <= count, f"{size} distinct draws from {count} are not possible.")
        if 2 * size > count:
            return self.shuffled(range(count))[:size]
        found: dict[int, None] = {}
        while len(found) < size:
            found[self.below(count)] = None
        return list(found)

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        return [item for _, _, item in sorted((self.bits(), i, item) for i, item in enumerate(items))]
