"""The shared part of tasks in words: a context with a question, and an answer that a model writes.

An example is text, built by a subclass from draws that depend on (seed, split, index) only. A row is its tokens, in
bytes or by any tokenizer, with the answer behind the question; the answer's tokens are the labels. So a run can be
trained on the task like on any other, and a run that reads text can be asked to write the answer.

    context  question  answer  (the next question  answer ...)  filler

The size is in tokens: a row holds `seq_len`, of which some are kept free for the answer. The largest haystack that fits
is found by bisection; an example that is still too long gets a smaller one.
"""

import abc
import bisect
import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Sequence
from typing import ClassVar, Literal, NoReturn

import numpy as np
from jaxtyping import Float, Int64

from engrax.data.config import IGNORE, SPLITS, Batch, require
from engrax.data.draws import Draws
from engrax.data.scoring_rules import match_all
from engrax.data.task import TaskConfig
from engrax.data.token_types import TokenTypes
from engrax.data.tokenizers import Tokenizer, load_tokenizer
from engrax.errors import UserError

DIGITS = "0123456789"
_ATTEMPTS = 20  # draws of one example


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question, and what a right answer is."""

    question: str  # ends with the words that the answer follows
    answer: str  # what training writes after it
    references: tuple[str, ...]  # what a right answer contains
    choices: tuple[str, ...] = ()  # the possible answers, if the most likely of them is the model's


@dataclasses.dataclass(frozen=True)
class Example:
    """One example. `depth` is the place of what is asked for in the context, from 0 to 1; None if it has no place."""

    context: str
    turns: tuple[Turn, ...]
    depth: float | None = None

    @property
    def pieces(self) -> list[str]:
        """The texts that are made tokens one by one: prompt and answer; with several turns also the context alone."""
        asked = [text for turn in self.turns for text in (turn.question, turn.answer)]
        return [self.context + asked[0], asked[1]] if len(self.turns) == 1 else [self.context, *asked]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextTask(TaskConfig):
    """Base of the tasks in words. A subclass has `_build`, `oracle`, `cue` and, where it differs, `score`."""

    whole_rows: ClassVar[bool] = True
    rule: ClassVar[str] = (
        "Score: the share of the references that the model's answer contains (greedy, as many tokens as the benchmark "
        "allows). Exact match: the answer begins as training would write it."
    )
    guess: ClassVar[float] = 0.0  # expected score of a uniform guess
    free_tokens: ClassVar[int] = 128  # tokens that the benchmark keeps for the answer
    least_units: ClassVar[int] = 1  # of the haystack
    characters: ClassVar[str] = DIGITS  # that the tokenizer must be able to write
    cue: ClassVar[str] = ""  # pattern of the end of every question
    shared: ClassVar[Literal["turns", "requests"]] = "turns"  # whether a question stands behind those before it

    seq_len: int = 1024  # tokens per row, those for the answer included
    tokenizer_file: str | None = None  # path of a Hugging Face tokenizer.json; None = bytes
    answer_tokens: int | None = None  # tokens kept for the answer, at least its own; None = the benchmark's

    def __post_init__(self):
        super().__post_init__()
        given = self.answer_tokens
        require(given is None or given >= 1, f"answer_tokens must be at least 1, not {given}.")

    @abc.abstractmethod
    def _build(self, draws: Draws, units: int, split: str, index: int) -> Example:
        """An example with `units` units of haystack. Draws whose number depends on `units` come last."""

    @abc.abstractmethod
    def oracle(self, prompt: str) -> str:
        """The answer to the last question, found in the text alone."""

    def score(self, output: str, example: Example, turn: Turn) -> tuple[int, int]:
        """(hits, trials) of what a model wrote, by the benchmark's own rule."""
        return match_all(output, turn.references)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UserError for a missing or damaged file."""
        return load_tokenizer(self.tokenizer_file)

    @property
    def vocab_size(self) -> int:
        """The vocabulary size in tokens."""
        return self.tokenizer.vocab_size

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing one token of an answer uniformly among all tokens."""
        return 1.0 / self.vocab_size

    def warnings(self) -> list[str]:
        """None; raises UserError if no example can be made."""
        self.check()
        return []

    def check(self) -> None:
        """Raises UserError if the first example cannot be made: too short a row, a tokenizer without digits, a missing
        folder."""
        self.example("validation", 0)

    def example(self, split: str, index: int) -> Example:
        """The example `index` of a split, as text."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        found, _ = self._fitted(split, int(index))
        return found

    def depths(self, count: int) -> Float[np.ndarray, " N"]:
        """The places of what the first `count` validation examples ask for; NaN without one."""
        found = [self.example("validation", i).depth for i in range(count)]
        return np.array([np.nan if depth is None else depth for depth in found])

    def writes(self, example: Example) -> int:
        """Tokens that a model may write for an answer."""
        longest = max(len(self.tokenizer.encode(turn.answer)) for turn in example.turns)
        return max(longest, self.free_tokens if self.answer_tokens is None else self.answer_tokens)

    def _fitted(self, split: str, index: int) -> tuple[Example, list[np.ndarray]]:
        """An example that fits, and the tokens of its pieces. One whose words are too long for any haystack is drawn
        again."""
        for attempt in range(_ATTEMPTS):
            units = self._units
            while True:
                example, tokens, over = self._sized(split, index, units, attempt)
                if over <= 0:
                    return example, tokens
                if units == self.least_units:
                    break
                average = max(1, sum(map(len, tokens)) // units)
                units = max(self.least_units, units - max(1, over // average))
        self._refuse(over)

    def _sized(self, split: str, index: int, units: int, attempt: int = 0) -> tuple[Example, list[np.ndarray], int]:
        """(an example, the tokens of its pieces, how many of them are too many)."""
        example = self._build(Draws(self.seed, SPLITS.index(split), index, attempt), units, split, index)
        tokens = [self.tokenizer.encode(piece) for piece in example.pieces]
        used = sum(map(len, tokens[:-1])) + max(len(tokens[-1]), self.writes(example))
        return example, tokens, used - self.seq_len

    @functools.cached_property
    def _units(self) -> int:
        """Units of haystack with which the first validation example just fits."""
        readable = self.tokenizer.decode(self.tokenizer.encode(self.characters)).replace(" ", "")
        require(
            readable == self.characters,
            f"tokenizer {self.tokenizer_file} does not know all of {self.characters} (it gives back {readable!r}), "
            f"which the answers of {self.registered_name} need; use another tokenizer.",
        )

        def over(units: int) -> int:
            return self._sized("validation", 0, units)[2]

        if (missing := over(self.least_units)) > 0:
            self._refuse(missing)
        most = 2 * self.least_units
        while over(most) <= 0:
            most *= 2
        return bisect.bisect_left(range(most), 1, lo=self.least_units, key=over) - 1

    def _refuse(self, over: int) -> NoReturn:
        raise UserError(
            f"seq_len {self.seq_len} is too short for {self.registered_name}: prompt, needle and answer need {over} "
            f"tokens more; choose at least {self.seq_len + over}, or fewer answer_tokens."
        )

    def _examples(self, key, row: Int64[np.ndarray, "N 1"]):
        tokens = np.zeros((len(row), self.seq_len), np.int32)
        targets = np.full(tokens.shape, IGNORE, np.int32)
        for i, index in enumerate(row[:, 0]):
            _, pieces = self._fitted(SPLITS[key[1]], int(index))
            at, last = 0, len(pieces) - 1
            for number, piece in enumerate(pieces):
                tokens[i, at : at + len(piece)] = piece
                if (last - number) % 2 == 0 and number:  # an answer
                    targets[i, at - 1 : at - 1 + len(piece)] = piece
                at += len(piece)
        return tokens, targets

    def solve(self, tokens):
        """The oracle: the answers behind every question, computed from the text."""
        answers = np.full(tokens.shape, IGNORE, np.int32)
        for row, found in zip(tokens, answers):
            text = self.tokenizer.decode(row)
            for question in re.finditer(self.cue, text):
                prompt = text[: question.end()]
                at = bisect.bisect_left(range(len(row)), len(prompt), key=lambda n: len(self.tokenizer.decode(row[:n])))
                answer = self.tokenizer.encode(self.oracle(prompt))[: len(row) - at + 1]
                found[at - 1 : at - 1 + len(answer)] = answer
        return answers

    def slices(self, batch: Batch) -> TokenTypes:
        """One kind of label: the answer's tokens."""
        return TokenTypes(("answer",), np.where(batch["targets"] != IGNORE, 0, -1))

    def made_of(self) -> Sequence[str]:
        """Digests of the texts that examples are made of."""
        return ()

    def digest(self) -> str:
        """Returns the SHA-256 of the fields, the tokenizer, the texts and the first examples; not of their paths."""
        fields = {name: v for name, v in dataclasses.asdict(self).items() if not name.endswith(("_path", "_file"))}
        manifest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        manifest.update("\n".join((self.registered_name, self.tokenizer.manifest, *self.made_of())).encode())
        for split in SPLITS:
            tokens, _ = self.generate(split, np.arange(min(16, self.num_examples(split))))
            manifest.update(tokens.astype("<i4").tobytes())
        return manifest.hexdigest()


def listed(items: Sequence[str]) -> str:
    """ "a", "a, and b", "a, b, and c": RULER's enumeration."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + ", and " + items[-1]
