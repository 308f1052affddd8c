"""BABILong (Kuratov et al., arXiv 2406.10149, and its published code): stories of bAbI in a long text.

The facts of a story stand in order between the sentences of a background text, at places drawn with replacement. The
question and its answer of one word follow. Background sentences have at least ten tokens and begin at a random one. An
answer is right if its first sentence names exactly the target among the answers of the task; those that the question
names do not count.

Both texts are yours: `babi_path` is a folder with files such as qa1_single-supporting-fact_train.txt and _test.txt, and
`haystack_path` the background. Only stories that fit into the row are used, of at most an eighth as many facts as it
has tokens. The prompt is that of the published fine-tuned models, without the instructions for chat models.
"""

import dataclasses
import functools
import hashlib
import re
from typing import ClassVar, NamedTuple

import numpy as np
from etils import epath

from engrax.data.config import DATASETS, SPLITS, require
from engrax.data.draws import Draws
from engrax.data.haystack import Text, load_text
from engrax.data.scoring_rules import only_label
from engrax.data.text_task import Example, TextTask, Turn

LEAST_TOKENS = 10  # of a background sentence


class Story(NamedTuple):
    """One question of bAbI."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: int  # the place of the last fact that the answer needs


def read_stories(text: str, name: str) -> list[Story]:
    """The questions of a bAbI file, each with the facts before it. Raises UserError if it is no such file."""
    found, facts, places = [], [], {}
    for line in text.splitlines():
        number, _, rest = line.partition(" ")
        require(number.isdigit() and bool(rest), f"{name} is no file of bAbI: {line[:40]!r} has no number and text.")
        if number == "1":
            facts, places = [], {}
        if "\t" not in rest:
            places[number] = len(facts)
            facts.append(rest.strip())
            continue
        question, answer, *support = rest.split("\t")
        known = [places[n] for part in support for n in part.split() if n in places]
        if facts:
            found.append(Story(tuple(facts), question.strip(), answer.strip(), max(known, default=len(facts) - 1)))
    return found


@DATASETS.register("babilong")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Babilong(TextTask):
    """BABILong: facts of a bAbI story between the sentences of a long text."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "question_type")
    rule: ClassVar[str] = (
        "Score: the first sentence that the model writes names the target, and no other answer of the task that is not "
        "in the question. Exact match: the answer begins as training would write it."
    )
    free_tokens: ClassVar[int] = 20
    characters: ClassVar[str] = ""
    cue: ClassVar[str] = r"\nQuestion: [^\n]+\nAnswer:"

    babi_path: str = ""  # folder with bAbI's files
    question_type: str = "qa1"  # qa1 to qa20
    facts_from: float = 0.0  # per cent of the background, before which no fact stands
    facts_to: float = 100.0  # after which none stands
    haystack_path: str | None = None  # folder or file with the background; None = Python's own documentation

    def __post_init__(self):
        super().__post_init__()
        given = f"facts_from={self.facts_from} and facts_to={self.facts_to}"
        require(0 <= self.facts_from < self.facts_to <= 100, f"{given} must be ascending per cents of the background.")

    @functools.cached_property
    def _text(self) -> Text:
        return load_text(self.haystack_path)

    @functools.cached_property
    def _files(self) -> dict[str, str]:
        """The contents of the task's files, by split."""
        folder = epath.Path(self.babi_path)
        require(
            bool(self.babi_path) and folder.is_dir(),
            f"babi_path={self.babi_path!r} is no folder; name one with bAbI's files.",
        )
        found = {}
        for split, ending in zip(SPLITS, ("train", "test")):
            paths = sorted(folder.glob(f"{self.question_type}_*_{ending}.txt"))
            require(
                len(paths) == 1,
                f"{self.babi_path} holds {len(paths)} files {self.question_type}_*_{ending}.txt, not one.",
            )
            found[split] = paths[0].read_text(encoding="utf-8")
        return found

    @functools.cached_property
    def _all_stories(self) -> dict[str, list[Story]]:
        return {split: read_stories(text, f"{self.question_type} of {split}") for split, text in self._files.items()}

    @functools.cached_property
    def labels(self) -> tuple[str, ...]:
        """The answers of the task. Raises UserError for a task with answers of several words."""
        found = sorted({story.answer for stories in self._all_stories.values() for story in stories})
        require(
            not any("," in label for label in found),
            f"answers of {self.question_type} are lists, which BABILong's rule cannot judge; choose another.",
        )
        return tuple(found)

    @property
    def guess(self) -> float:
        """The score of naming one of the task's answers."""
        return 1 / len(self.labels)

    @functools.cached_property
    def _stories(self) -> dict[str, list[Story]]:
        """The stories that fit."""
        assert self.labels  # raises for answers that cannot be judged
        room = self.seq_len - (self.free_tokens if self.answer_tokens is None else self.answer_tokens)
        found = {}
        for split, stories in self._all_stories.items():
            few = [story for story in stories if len(story.facts) <= self.seq_len / 8]
            found[split] = [s for s in few if len(self.tokenizer.encode(" ".join(s.facts) + _asked(s.question))) < room]
            require(
                bool(found[split]),
                f"seq_len {self.seq_len} is too short for babilong: no story of {self.question_type} fits.",
            )
        return found

    def made_of(self):
        return self._text.manifest, *(hashlib.sha256(text.encode()).hexdigest() for text in self._files.values())

    def _background(self, draws: Draws, words: int) -> list[str]:
        """Sentences of `words` words together; the last one is cut."""
        every, found = self._text.sentences, []
        at, skipped = draws.below(len(every)), 0
        while words > 0:
            sentence = every[at % len(every)]
            at += 1
            if len(self.tokenizer.encode(sentence)) < LEAST_TOKENS:
                skipped += 1
                require(
                    skipped < len(every), "no sentence of the background has ten tokens; choose another haystack_path."
                )
                continue
            found.append(" ".join(sentence.split(" ")[:words]))
            words -= len(found[-1].split(" "))
        return found

    def _build(self, draws, units, split, index):
        story = draws.choice(self._stories[split])
        background = self._background(draws, units)
        ends = np.cumsum([0, *map(len, background)])
        shares = 100 * ends / ends[-1]
        outside = np.maximum(self.facts_from - shares, shares - self.facts_to).clip(0)
        gaps = np.flatnonzero(outside == outside.min()).tolist()  # the nearest, if no gap is inside
        places = sorted(draws.choice(gaps) for _ in story.facts)
        parts, before = [], 0
        for gap in range(len(background) + 1):
            for i, place in enumerate(places):
                if place == gap:
                    before = sum(len(part) + 1 for part in parts) if i == story.support else before
                    parts.append(story.facts[i])
            parts += background[gap : gap + 1]
        context = " ".join(parts)
        turn = Turn(_asked(story.question), f" {story.answer}.", (story.answer,))
        return Example(context, (turn,), min(before / len(context), 1.0))

    @functools.cached_property
    def _solutions(self) -> tuple[re.Pattern[str], dict[tuple, str]]:
        """(a pattern of every fact, {(facts, question): answer})."""
        stories = [story for of in self._all_stories.values() for story in of]
        facts = sorted({fact for story in stories for fact in story.facts}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, facts))), {s[:2]: s.answer for s in stories}

    def oracle(self, prompt):
        """The answer that bAbI has for the facts found in the text, in their order."""
        pattern, answers = self._solutions
        context, _, question = prompt.rpartition("\nQuestion: ")
        asked = question.removesuffix("\nAnswer:")
        return f" {answers[tuple(pattern.findall(context)), asked]}."

    def score(self, output, example, turn):
        """See the module."""
        return only_label(output, turn.references[0], turn.question, self.labels)


def _asked(question: str) -> str:
    return f"\nQuestion: {question}\nAnswer:"
