"""One context, many questions: the key-value task of SCBench (Li et al., arXiv 2412.10319, and its published code).

The context is a JSON object whose keys and values are UUIDs; the value of one key after another is asked for. With
`shared="turns"` a question stands behind those before it and their right answers. With `"requests"` each stands alone
behind the context. In both cases an evaluation reads the context once and continues from its state. An answer is
right if it contains the value.
"""

import dataclasses
import json
import re
from typing import ClassVar, Literal

from engrax.data.config import DATASETS, require
from engrax.data.niah import uuid
from engrax.data.text_task import Example, TextTask, Turn

_TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_QUESTION = '\n\nKey: "{key}"\nThe value associated with the specified key is: '


@DATASETS.register("key_values")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KeyValues(TextTask):
    """SCBench's key-value retrieval: several questions on one JSON object, which is read once."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "num_questions")
    free_tokens: ClassVar[int] = 150
    cue: ClassVar[str] = r"The value associated with the specified key is: "

    num_questions: int = 5  # keys that are asked for
    shared: Literal["turns", "requests"] = "turns"  # whether a question stands behind those before it

    def __post_init__(self):
        super().__post_init__()
        require(self.num_questions >= 1, f"num_questions must be at least 1, not {self.num_questions}.")

    @property
    def least_units(self) -> int:
        """Pairs of the smallest object: those that are asked for."""
        return self.num_questions

    def _build(self, draws, units, split, index):
        pairs = {uuid(draws): uuid(draws) for _ in range(units)}
        asked = [list(pairs)[i] for i in draws.sample(units, self.num_questions)]
        turns = tuple(Turn(_QUESTION.format(key=key), f'"{pairs[key]}"', (pairs[key],)) for key in asked)
        return Example(_TASK + json.dumps(pairs), turns)

    def oracle(self, prompt):
        """The value of the last key."""
        key = re.findall(r'\n\nKey: "([^"]+)"', prompt)[-1]
        context, _, _ = prompt.removeprefix(_TASK).partition("\n\n")
        return f'"{json.loads(context)[key]}"'
