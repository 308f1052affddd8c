"""Questions on documents, with the document cut around the answer: the recall tasks of "Just read twice" (Arora et al.,
arXiv 2407.05483, and its published code), on your own files.

`questions_path` is a file of JSON Lines, such as those of FDA, SWDE or SQuAD. A row is the document, without its last
point, then ". " and the question. A document that is too long is cut to a window whose middle is the first place of the
answer; questions whose answer the document lacks are left out. With `num_passes=2` the document is read twice. An
answer is right if what the model writes before the first new line contains it. Both ignore the case of letters.
"""

import dataclasses
import functools
import hashlib
import json
import re
from typing import Any, ClassVar

from etils import epath

from engrax.data.config import DATASETS, require
from engrax.data.scoring_rules import match_part
from engrax.data.text_task import Example, TextTask, Turn
from engrax.errors import UserError


@DATASETS.register("recall_window")
@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallWindow(TextTask):
    """JRT's recall tasks: questions on documents of your own files, cut around the answer."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "num_passes")
    rule: ClassVar[str] = (
        "Score: what the model writes before the first new line contains the answer. Exact match: the answer begins as "
        "training would write it."
    )
    free_tokens: ClassVar[int] = 48
    characters: ClassVar[str] = ""

    questions_path: str = ""  # file of JSON Lines
    train_path: str | None = None  # file of the train split; None = the same questions
    document_field: str = "text"  # field with the document
    question_field: str = "question"  # field with the question, or with the beginning of the answer's sentence
    answer_field: str = "value"  # field with the answer, or with a list of right ones; the first is the one looked for
    num_passes: int = 1  # times the document is shown

    def __post_init__(self):
        super().__post_init__()
        require(self.num_passes >= 1, f"num_passes must be at least 1, not {self.num_passes}.")

    @functools.cached_property
    def _questions(self) -> dict[str, list[tuple[str, str, tuple[str, ...]]]]:
        """(document, question, right answers) by split."""
        found = {"validation": self._read(self.questions_path)}
        return found | {"train": self._read(self.train_path) if self.train_path else found["validation"]}

    def _read(self, path: str) -> list[tuple[str, str, tuple[str, ...]]]:
        file = epath.Path(path)
        require(bool(path) and file.is_file(), f"question file {path!r} does not exist; name a file of JSON Lines.")
        found = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            record = _record(line, f"{path}, line {number}")
            names = (self.document_field, self.question_field, self.answer_field)
            missing = [name for name in names if not record.get(name)]
            require(not missing, f"{path}, line {number} has no field {missing[:1]}; name its fields in the config.")
            document, question, answers = (record[name] for name in names)
            answers = tuple(answers) if isinstance(answers, list) else (answers,)
            if answers[0].lower() in document.lower():
                found.append((document.strip().removesuffix("."), question.strip(), answers))
        require(bool(found), f"no document of {path} contains its answer.")
        return found

    def num_questions(self, split: str) -> int:
        """Questions of a split whose answers their documents contain."""
        return len(self._questions[split])

    def made_of(self):
        return [hashlib.sha256(repr(questions).encode()).hexdigest() for questions in self._questions.values()]

    @property
    def _units(self) -> int:
        """Letters of the largest window; a token is taken to have at most eight."""
        return 8 * self.seq_len

    def _build(self, draws, units, split, index):
        count = self.num_questions(split)
        require(
            split == "train" or index < count,
            f"{self.questions_path} has {count} questions with the answer in the document; ask for at most {count}.",
        )
        document, question, answers = self._questions[split][index % count]
        place = document.lower().index(answers[0].lower())
        start = max(0, min(place + len(answers[0]) // 2 - units // 2, len(document) - units))
        window = document[start : start + units]
        turn = Turn(f". {question}", f" {answers[0]}\n", answers)
        return Example(". ".join([window] * self.num_passes), (turn,), min((place - start) / len(window), 1.0))

    @property
    def cue(self) -> str:
        """The questions."""
        questions = {question for of in self._questions.values() for _, question, _ in of}
        return "|".join(re.escape(f". {question}") for question in sorted(questions, key=len, reverse=True))

    def oracle(self, prompt):
        """The file's answer to the question on the document of which the prompt shows a part, if it is shown."""
        for document, question, answers in (each for of in self._questions.values() for each in of):
            shown = prompt.removesuffix(f". {question}")
            window = shown[: (len(shown) - 2 * (self.num_passes - 1)) // self.num_passes]
            if shown != prompt and window in document and answers[0].lower() in window.lower():
                return f" {answers[0]}\n"
        return "\n"

    def score(self, output, example, turn):
        """See the module."""
        return match_part(output.partition("\n")[0], turn.references)


def _record(line: str, name: str) -> dict[str, Any]:
    """The fields of a line. Raises UserError if it is no JSON object."""
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{name} is no JSON object.")
    return found
