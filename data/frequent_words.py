"""Frequent words by the rules of RULER (arXiv 2404.06654, and its published code).

A text of coded words, each of six random letters, of which the k-th most frequent of n words occurs
floor(n k^-alpha / zeta(alpha)) times. The most frequent one is written as dots. The next three are asked for. There are
as many different words as the row has fifties of tokens, less one. A row's score is the share of the three words that
the answer contains.
"""

import collections
import dataclasses
import math
import re
import string
from typing import ClassVar

import numpy as np
from jaxtyping import Int

from engrax.data.config import DATASETS, require
from engrax.data.text_task import Example, TextTask, Turn, listed

_TASK = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text? Answer: According to the coded text above, the three most frequently "
    "appeared words are:"
)
_LETTERS, _ASKED, _DOTS = 6, 3, "..."


@DATASETS.register("frequent_words")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FrequentWords(TextTask):
    """RULER's frequent words: the three most frequent words of a coded text."""

    free_tokens: ClassVar[int] = 50
    characters: ClassVar[str] = string.ascii_lowercase
    cue: ClassVar[str] = r"the three most frequently appeared words are:"

    alpha: float = 2.0  # exponent of the frequencies

    def __post_init__(self):
        super().__post_init__()
        require(1 < self.alpha <= 8, f"alpha must lie above 1 and be at most 8, not {self.alpha}.")

    @property
    def least_units(self) -> int:
        """Words of the smallest text: with more, the last word that is asked for is more frequent than the next."""
        fourth, fifth = (self._share(k) for k in (_ASKED + 1, _ASKED + 2))
        return math.ceil(1 / (fourth - fifth))

    def _share(self, rank):
        from scipy.special import zeta

        return rank**-self.alpha / zeta(self.alpha)

    def counts(self, units: int) -> Int[np.ndarray, " words"]:
        """How often each word of a text of about `units` words occurs, the most frequent first."""
        ranks = np.arange(1, max((self.seq_len - 50) // 50, _ASKED + 2) + 1, dtype=float)
        return (units * self._share(ranks)).astype(int)

    def _build(self, draws, units, split, index):
        counts, names = self.counts(units), {}
        while len(names) < len(counts):
            names[draws.letters(string.ascii_lowercase, _LETTERS)] = None
        words = [_DOTS, *list(names)[1:]]
        text = draws.shuffled([word for word, count in zip(words, counts) for _ in range(count)])
        asked = words[1 : 1 + _ASKED]
        return Example(_TASK + " ".join(text), (Turn(_QUESTION, f" {listed(asked)}.", tuple(asked)),))

    def oracle(self, prompt):
        """The most frequent words but the dots."""
        text = re.search(re.escape(_TASK) + "(.*)\n", prompt)[1]
        counts = collections.Counter(word for word in text.split() if word != _DOTS)
        return f" {listed([word for word, _ in counts.most_common(_ASKED)])}."
