"""Variable tracking by the rules of RULER (arXiv 2404.06654, and its published code).

"VAR ABCDE = 12345" and then "VAR FGHIJ = VAR ABCDE" and so on stand in this order between repeated paragraphs. All
names that hold the value are asked for. A smaller worked example with names of three letters goes first. A row's score
is the share of the names that the answer contains.

Differences from the published code: the worked example is drawn for every row, and has at least as many paragraphs as
lines; more chains than one have values of their own.
"""

import dataclasses
import re
import string
from typing import ClassVar

from engrax.data.config import DATASETS, require
from engrax.data.draws import Draws
from engrax.data.haystack import NOISE
from engrax.data.text_task import Example, TextTask, Turn

_TASK = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_QUESTION = (  # "assgined" stands in the published prompt
    "\nQuestion: Find all variables that are assigned the value {value} in the text above."
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assgined the "
    "value {value}, they are: "
)
_WORKED_TOKENS = 500  # of the worked example, at most


@DATASETS.register("variable_tracking")
@dataclasses.dataclass(frozen=True, kw_only=True)
class VariableTracking(TextTask):
    """RULER's variable tracking: all names that a chain of assignments gives a value."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "num_hops", "num_chains")
    free_tokens: ClassVar[int] = 30
    cue: ClassVar[str] = r"variables are assgined the value \d+, they are: "

    num_chains: int = 1  # chains; the first one is asked for
    num_hops: int = 4  # assignments of a name to a name, in each chain
    worked_example: bool = True  # whether an example with its answer goes first

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_chains", "num_hops"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")

    @property
    def least_units(self) -> int:
        """Paragraphs of the smallest haystack: as many as a chain has lines."""
        return self.num_hops + 1

    def _build(self, draws, units, split, index):
        worked = ""
        if self.worked_example:
            paragraph = len(self.tokenizer.encode(NOISE + "\n"))
            size = max(self.least_units, (_WORKED_TOKENS - len(self.tokenizer.encode(_TASK + _QUESTION))) // paragraph)
            context, question, names = self._problem(draws, size, 3)
            worked = f"{context}{question}{' '.join(names)}\n\n"
        context, question, names = self._problem(draws, units, 5)
        return Example(worked + context, (Turn(question, " ".join(names) + "\n", tuple(names)),))

    def _problem(self, draws: Draws, units: int, letters: int) -> tuple[str, str, list[str]]:
        """(context, question, the names that are asked for)."""
        names: dict[str, None] = {}
        while len(names) < (self.num_hops + 1) * self.num_chains:
            names[draws.letters(string.ascii_uppercase, letters)] = None
        values = [10_000 + i for i in draws.sample(89_999, self.num_chains)]
        chains = [list(names)[i :: self.num_chains] for i in range(self.num_chains)]
        lines = [NOISE] * units
        for chain, value in zip(chains, values):
            places = sorted(draws.sample(units, len(chain)))
            for i, (place, name) in enumerate(zip(places, chain)):
                lines.insert(place + i, f"VAR {name} = VAR {chain[i - 1]} " if i else f"VAR {name} = {value}")
        question = _QUESTION.format(value=values[0], count=len(chains[0]))
        return _TASK + "\n".join(lines), question, chains[0]

    def oracle(self, prompt):
        """The names that hold the value, in the order of the text."""
        text = prompt[prompt.rindex(_TASK) :]
        asked = re.search(r"that are assigned the value (\d+)", text)[1]
        held: dict[str, str] = {}
        for name, other, value in re.findall(r"VAR ([A-Z]+) = (?:VAR ([A-Z]+)|(\d+))", text):
            held[name] = value or held[other]
        return " ".join(name for name, value in held.items() if value == asked) + "\n"
