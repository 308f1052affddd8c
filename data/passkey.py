"""The passkey test of landmark attention (Mohtashami and Jaggi, arXiv 2305.16300, and its published code).

A line with the pass key stands in a repeated paragraph, which is cut off at any letter before and after it. The key is
uniform in [1, 50000]. An answer is right if its first integer is the key. The published sizes are numbers of letters;
here the size is `seq_len`, in tokens.
"""

import dataclasses
import re
from typing import ClassVar

from engrax.data.config import DATASETS, require
from engrax.data.haystack import NOISE
from engrax.data.scoring_rules import first_integer
from engrax.data.text_task import Example, TextTask, Turn

MOST = 50_000
_TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there."
)
_LINE = re.compile(r"The pass key is (\d+)\. Remember it")
_QUESTION = "\nWhat is the pass key? The pass key is"


@DATASETS.register("passkey")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Passkey(TextTask):
    """Passkey retrieval: a number, stated twice in a line of a repeated paragraph."""

    guess: ClassVar[float] = 1 / MOST
    rule: ClassVar[str] = "Score: the first integer that the model writes is the pass key."
    free_tokens: ClassVar[int] = 10
    cue: ClassVar[str] = re.escape(_QUESTION)

    depth: float | None = None  # per cent of the paragraphs before the line; None = drawn

    def __post_init__(self):
        super().__post_init__()
        require(
            self.depth is None or 0 <= self.depth <= 100,
            f"depth must lie between 0 and 100 per cent, not {self.depth}.",
        )

    def _build(self, draws, units, split, index):
        key, place = 1 + draws.below(MOST), draws.below(units + 1)
        before = place if self.depth is None else int(units * self.depth / 100)
        garbage = " ".join([NOISE] * (units // len(NOISE) + 1))
        line = f"The pass key is {key}. Remember it. {key} is the pass key."
        context = "\n".join((_TASK, garbage[:before], line, garbage[: units - before]))
        return Example(context, (Turn(_QUESTION, f" {key}.", (str(key),)),), before / units)

    def oracle(self, prompt):
        """The number in the line."""
        return f" {_LINE.findall(prompt)[-1]}."

    def score(self, output, example, turn):
        """See the module."""
        return first_integer(output, turn.references)
