"""Common words by the rules of RULER (arXiv 2404.06654, and its published code).

A numbered list in which ten words occur more often than all others; these are asked for. A smaller worked example goes
first. Common words occur 30 times and others 3 times (in the worked example 10 and 3 times); with less than 4,096
tokens 6 and 1 times (3 and 1). A row's score is the share of the ten words that the answer contains.

Differences from the published code: the words are made up or yours (`words_path`), and the answer that training writes
has them in the order in which they first occur.
"""

import collections
import dataclasses
import functools
import re
from typing import ClassVar

from engrax.data.config import DATASETS, require
from engrax.data.draws import Draws
from engrax.data.haystack import load_words
from engrax.data.text_task import Example, TextTask, Turn

SHORT = 4096  # tokens; shorter rows repeat words less often
_TASK = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n"
)
_QUESTION = (
    "\nQuestion: What are the {n} most common words in the above list? Answer: The top {n} words that appear most "
    "often in the list are:"
)


@DATASETS.register("common_words")
@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonWords(TextTask):
    """RULER's common words: the ten words that occur most often in a list."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "num_common")
    free_tokens: ClassVar[int] = 120
    cue: ClassVar[str] = r"words that appear most often in the list are:"

    num_common: int = 10  # common words
    worked_example: bool = True  # whether an example with its answer goes first
    words_path: str | None = None  # file with words; None = made-up words

    def __post_init__(self):
        super().__post_init__()
        require(self.num_common >= 1, f"num_common must be at least 1, not {self.num_common}.")

    @property
    def least_units(self) -> int:
        """Distinct words of the smallest list: the common ones and one other."""
        return self.num_common + 1

    @functools.cached_property
    def _words(self) -> tuple[str, ...]:
        return load_words(self.words_path, max(self.seq_len // 4, 4 * self.num_common))

    def made_of(self):
        return () if self.words_path is None else self._words

    def _build(self, draws, units, split, index):
        short, worked = self.seq_len < SHORT, ""
        question = _QUESTION.format(n=self.num_common)
        if self.worked_example:
            words = self.num_common + (10 if short else 30)
            context, common = self._problem(draws, words, *((3, 1) if short else (10, 3)))
            worked = f"{context}{question}{_numbered(common)}\n"
        context, common = self._problem(draws, units, *((6, 1) if short else (30, 3)))
        return Example(worked + context, (Turn(question, _numbered(common) + "\n", tuple(common)),))

    def _problem(self, draws: Draws, words: int, often: int, seldom: int) -> tuple[str, list[str]]:
        """(the list, the common words in the order in which they occur)."""
        chosen = [self._words[i] for i in draws.sample(len(self._words), words)]
        common = chosen[: self.num_common]
        whole = draws.shuffled(common * often + chosen[self.num_common :] * seldom)
        return _TASK + _numbered(whole), [word for word in dict.fromkeys(whole) if word in common]

    def oracle(self, prompt):
        """The words that the last list has most often."""
        text = prompt[prompt.rindex(_TASK) :].partition("\nQuestion")[0]
        counts = collections.Counter(re.findall(r"\d+\. (\S+)", text))
        common = {word for word, _ in counts.most_common(self.num_common)}
        return _numbered([word for word in counts if word in common]) + "\n"


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
