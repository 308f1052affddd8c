"""Needles in a haystack by the rules of RULER (Hsieh et al., arXiv 2404.06654, and its published code).

A needle is the sentence "One of the special magic numbers for KEY is: VALUE." The haystack is a paragraph again and
again (`noise`), running text (`essay`) or needles with other keys (`needle`). In text a needle stands between two
sentences, at the depth p of 40 values between 0 and 100 per cent, drawn without replacement: before sentence
int(S p / 100) of S. Between paragraphs and needles its place is uniform, never the last. The question names the keys,
and the prompt ends with the beginning of the answer. A row's score is the share of the values that the answer contains.

Differences from the published code: keys are distinct; the order of the needles is drawn for every example instead of
once; words and running text are made up or local (`words_path`, `haystack_path`); the haystack is as large as fits,
where the published code takes steps of 25 units or 500 words; the answer that training writes lists the values of a key
in the order of the text. Validation rows begin at the beginning of the running text, as in RULER, train rows anywhere.
"""

import dataclasses
import functools
import re
from typing import ClassVar, Literal

import numpy as np

from engrax.data import haystack as haystacks
from engrax.data.config import DATASETS, require
from engrax.data.draws import Draws
from engrax.data.haystack import NOISE, Text, load_text, load_words
from engrax.data.text_task import Example, TextTask, Turn, listed

Kind = Literal["words", "numbers", "uuids"]

DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int).tolist()  # per cent
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
TASK = (
    "{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
QUESTION = (
    "\nWhat {are_all} the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text {are}"
)
_FACT = re.compile(r"One of the special magic \w+ for (\S+) is: (\S+)\.(?=\s|$)")
_ASKED = re.compile(
    r"What is the special magic \w+ for (.+?) mentioned|What are all the special magic \w+ for (.+?) ment"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles(TextTask):
    """Base of the needle tasks, whose numbers and kinds are fields."""

    axes: ClassVar[tuple[str, ...]] = ("seq_len", "num_keys", "num_values", "num_queries")
    cue: ClassVar[str] = r"The special magic \w+ for [^\n]+? mentioned in the provided text (?:is|are)"

    haystack: Literal["noise", "essay", "needle"] = "essay"  # what surrounds the needles
    key_kind: Kind = "words"
    value_kind: Kind = "numbers"  # numbers have seven digits
    num_keys: int = 1  # needles' keys, the queried ones among them
    num_values: int = 1  # needles of each key
    num_queries: int = 1  # keys asked for
    depth: float | None = None  # per cent of the haystack before the first needle asked for; None = drawn
    haystack_path: str | None = None  # folder or file with the running text; None = Python's own documentation
    words_path: str | None = None  # file with the words of the keys; None = made-up words

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_keys", "num_values", "num_queries"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        most = len(DEPTHS)
        require(
            self.haystack != "essay" or self._needles <= most,
            f"running text has {most} places for needles, and there are {self._needles}; have fewer keys or values.",
        )
        require(
            self.depth is None or 0 <= self.depth <= 100,
            f"depth must lie between 0 and 100 per cent, not {self.depth}.",
        )

    @property
    def _keys(self) -> int:
        return max(self.num_keys, self.num_queries)

    @property
    def _needles(self) -> int:
        return self._keys * self.num_values

    @property
    def least_units(self) -> int:
        """Sentences' words, paragraphs or other needles of the smallest haystack."""
        return 1 if self.haystack == "essay" else self._needles

    @functools.cached_property
    def _text(self) -> Text:
        return load_text(self.haystack_path)

    @functools.cached_property
    def _words(self) -> tuple[str, ...]:
        return load_words(self.words_path, 64)

    def made_of(self):
        text = (self._text.manifest,) if self.haystack == "essay" else ()
        return text if self.words_path is None else (*text, *self._words)

    def _drawn(self, draws: Draws, kind: Kind) -> str:
        if kind == "numbers":
            return str(10**6 + draws.below(9 * 10**6))
        if kind == "words":
            return f"{draws.choice(self._words)}-{draws.choice(self._words)}"
        return uuid(draws)

    def _distinct(self, draws: Draws, count: int, taken: set[str]) -> list[str]:
        found, most = [], len(self._words) ** 2 // 2
        require(
            self.key_kind != "words" or count <= most,
            f"{len(self._words)} words are too few for {count} keys; set words_path to a longer list.",
        )
        while len(found) < count:
            key = self._drawn(draws, self.key_kind)
            if key not in taken:
                taken.add(key)
                found.append(key)
        return found

    def _build(self, draws: Draws, units: int, split: str, index: int) -> Example:
        taken: set[str] = set()
        keys = self._distinct(draws, self._keys, taken)
        asked = draws.sample(self._keys, self.num_queries)
        facts = draws.shuffled(
            [(i, self._drawn(draws, self.value_kind)) for i in range(self._keys) for _ in range(self.num_values)]
        )
        needles = [NEEDLE.format(kind=self.value_kind, key=keys[i], value=value) for i, value in facts]
        first = next(place for place, (i, _) in enumerate(facts) if i in asked)
        context, depth, order = self._hidden(draws, needles, first, units, split, taken)
        values = [value for i in asked for j, value in (facts[place] for place in order) if j == i]
        return Example(self._task() + context, (self._turn([keys[i] for i in asked], values),), depth)

    def _hidden(self, draws: Draws, needles: list[str], first: int, units: int, split: str, taken: set[str]):
        """(the haystack with the needles, the place of needle `first` in it, the needles in the order of the text)."""
        if self.haystack == "essay":
            start = 0 if split == "validation" else draws.below(len(self._text.words))
            around, space = haystacks.sentences(self._text.piece(start, units)), " "
            places = [int(len(around) * DEPTHS[i] / 100) for i in draws.sample(len(DEPTHS), len(needles))]
        else:
            around, space = [NOISE] * units, "\n"
            places = draws.sample(units, len(needles))
            if self.haystack == "needle":
                others = self._distinct(draws, units, taken)
                around = [self._other(draws, key) for key in others]
        places.sort()
        order = list(range(len(needles)))
        if self.depth is not None:
            places[first] = int(len(around) * self.depth / 100)
            order.sort(key=lambda i: (places[i], i))
        parts, at, before = [], 0, []
        for i in order:
            parts += around[at : places[i]]
            before = list(parts) if i == first else before
            parts.append(needles[i])
            at = places[i]
        context = space.join(parts + around[at:])
        return context, len(space.join(before)) / max(len(context) - len(needles[first]), 1), order

    def _other(self, draws: Draws, key: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=self._drawn(draws, self.value_kind))

    @property
    def _wording(self) -> dict[str, str]:
        """RULER's singular for one value, else its plural."""
        if self.num_queries * self.num_values == 1:
            return dict(some="A", are="is", are_all="is", kind=self.value_kind[:-1])
        return dict(some="Some", are="are", are_all="are all", kind=self.value_kind)

    def _task(self) -> str:
        return TASK.format(**self._wording)

    def _turn(self, keys: list[str], values: list[str]) -> Turn:
        question = QUESTION.format(query=listed(keys), **self._wording)
        return Turn(question, f" {listed(values)}.", tuple(values))

    def oracle(self, prompt: str) -> str:
        """The values of the keys in the question, in the order of the text."""
        *_, last = _ASKED.finditer(prompt)
        keys = re.split(r", and |, ", last[1] or last[2])
        facts = _FACT.findall(prompt)
        return f" {listed([value for asked in keys for key, value in facts if key == asked])}."


def uuid(draws: Draws) -> str:
    """A random UUID (version 4, RFC 4122)."""
    digits = f"{draws.bits():016x}{draws.bits():016x}"
    variant = "89ab"[int(digits[16], 16) % 4]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


@DATASETS.register("niah_single_1")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahSingle1(Needles):
    """RULER's S-NIAH-1: a number in a repeated paragraph ("passkey")."""

    haystack: Literal["noise", "essay", "needle"] = "noise"


@DATASETS.register("niah_single_2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahSingle2(Needles):
    """RULER's S-NIAH-2: a number in running text."""


@DATASETS.register("niah_single_3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahSingle3(Needles):
    """RULER's S-NIAH-3: a UUID in running text."""

    value_kind: Kind = "uuids"


@DATASETS.register("niah_multikey_1")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahMultikey1(Needles):
    """RULER's MK-NIAH-1: four needles in running text, one of them asked for."""

    num_keys: int = 4


@DATASETS.register("niah_multikey_2")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahMultikey2(Needles):
    """RULER's MK-NIAH-2: one of a haystack of needles."""

    haystack: Literal["noise", "essay", "needle"] = "needle"


@DATASETS.register("niah_multikey_3")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahMultikey3(Needles):
    """RULER's MK-NIAH-3: one of a haystack of needles whose keys and values are UUIDs."""

    haystack: Literal["noise", "essay", "needle"] = "needle"
    key_kind: Kind = "uuids"
    value_kind: Kind = "uuids"


@DATASETS.register("niah_multivalue")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahMultivalue(Needles):
    """RULER's MV-NIAH: a key with four values in running text."""

    num_values: int = 4


@DATASETS.register("niah_multiquery")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NiahMultiquery(Needles):
    """RULER's MQ-NIAH: four keys in running text, all asked for."""

    num_keys: int = 4
    num_queries: int = 4
