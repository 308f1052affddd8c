"""Which of two segments came first: SORT (Pink et al., arXiv 2410.08133, Book-SORT).

A text of L words, then two of its segments of `segment_words` words as A and B, in random order. The distance of their
first words lies in one of four ranges with the upper ends L/4, L/3, L/2 and L. The letter with the higher likelihood is
the answer; chance is a half.

The prompt is ours. L is the largest number of words that fits into the row.
"""

import dataclasses
import functools
import re
from typing import ClassVar

from engrax.data.config import DATASETS, require
from engrax.data.haystack import Text, load_text
from engrax.data.text_task import Example, TextTask, Turn
from engrax.errors import UserError

RANGES = ((0, 1 / 4), (1 / 4, 1 / 3), (1 / 3, 1 / 2), (1 / 2, 1))  # of the distance, in lengths of the text
_TASK = "Read the following text.\n"
_QUESTION = (
    "\nHere are two segments of the text.\nSegment A: {a}\nSegment B: {b}\nWhich segment came first in the text? "
    "Answer: Segment"
)


@DATASETS.register("segment_order")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentOrder(TextTask):
    """SORT: which of two segments of a text came first."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "segment_words", "distance")
    rule: ClassVar[str] = "Score: the right letter is more likely than the other one after the question."
    guess: ClassVar[float] = 0.5
    free_tokens: ClassVar[int] = 2
    characters: ClassVar[str] = "AB"
    cue: ClassVar[str] = r"Which segment came first in the text\? Answer: Segment"

    segment_words: int = 20  # words of a segment
    distance: int | None = None  # range of the distance, 0 to 3; None = drawn
    haystack_path: str | None = None  # folder or file with the text; None = Python's own documentation

    def __post_init__(self):
        super().__post_init__()
        require(self.segment_words >= 1, f"segment_words must be at least 1, not {self.segment_words}.")
        known = (None, 0, 1, 2, 3)
        require(self.distance in known, f"distance must be None or 0 to 3, not {self.distance}.")

    @property
    def least_units(self) -> int:
        """Words of the smallest text: a quarter of it is longer than a segment."""
        return 4 * self.segment_words + 4

    @functools.cached_property
    def _text(self) -> Text:
        return load_text(self.haystack_path)

    def made_of(self):
        return (self._text.manifest,)

    def _build(self, draws, units, split, index):
        every = self._text.words
        require(
            units <= len(every), f"the text has {len(every)} words, fewer than a row of {self.seq_len} tokens takes."
        )
        part = draws.below(4) if self.distance is None else self.distance
        swapped = draws.below(2)
        low, high = (int(units * share) for share in RANGES[part])
        low, high = max(low + 1, self.segment_words), min(high, units - self.segment_words)
        for _ in range(100):
            words = self._text.piece(draws.below(len(every) - units + 1), units).split(" ")
            apart = low + draws.below(high - low + 1)
            first = draws.below(units - self.segment_words - apart + 1)
            segments = [" ".join(words[at : at + self.segment_words]) for at in (first, first + apart)]
            text = " ".join(words)
            if all(text.count(segment) == 1 for segment in segments):
                break
        else:
            raise UserError("the text repeats itself, so that segments have no order; set haystack_path to another.")
        a, b = segments[::-1] if swapped else segments
        answer = " B" if swapped else " A"
        turn = Turn(_QUESTION.format(a=a, b=b), answer, (answer,), (" A", " B"))
        return Example(_TASK + text, (turn,), first / units)

    def oracle(self, prompt):
        """The letter of the segment that is found first."""
        a, b = (re.search(rf"\nSegment {letter}: (.*)\n", prompt)[1] for letter in "AB")
        text = prompt[: prompt.rindex("\nHere are two segments")]
        return " A" if text.index(a) < text.index(b) else " B"

    def score(self, output, example, turn):
        """Whether the letter is the right one."""
        return int(output == turn.references[0]), 1
