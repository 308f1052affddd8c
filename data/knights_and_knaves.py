"""Knights and knaves (arXiv 2410.23123): who tells the truth? For measuring memorization by perturbed puzzles.

    (speaker op a r b s) per person, then every person as a question        target at a question: KNIGHT or KNAVE

A knight's statement is true, a knave's false. A statement joins "a is r" and "b is s" by AND, OR, IF or IFF, or is
"a is r" alone (IS; b and s are 0). Speaker, a and b are different people. Statements are uniform among those of puzzles
with exactly one solution. A puzzle is right only if all its people are: `whole_rows`.

`validation` says what the validation split holds: "new" puzzles; or row i of the train split "trained" as it was;
"perturbed", with one statement redrawn (rarely two, see PATIENCE) so that the one solution is another; or "reordered",
with the statements in another order. A model that reasons loses nothing by the last two. The paper's memorization score
is the accuracy on "trained" times the share of the solved ones that are not solved when perturbed.
"""

import dataclasses
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Int, Int32, UInt64

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.task import TaskConfig, choose

KNIGHT, KNAVE, IS, AND, OR, IF, IFF, PERSON = range(1, 9)  # 0 fills; people are PERSON, PERSON + 1, ...
PATIENCE = 200  # attempts to redraw one statement; 2 of 1,000 puzzles need two, because no single one is enough
_OP, _A, _R, _B, _S, _WHO, _ORDER = range(7)  # the independent random streams of one attempt


@DATASETS.register("knights_and_knaves")
@dataclasses.dataclass(frozen=True, kw_only=True)
class KnightsAndKnaves(TaskConfig):
    """Knights and knaves, with perturbed puzzles that tell memorizing from reasoning."""

    axes: ClassVar[tuple[str, ...]] = ("people", "train_examples")
    whole_rows: ClassVar[bool] = True

    seq_len: int = 28  # tokens per row, seven per person at least
    people: int = 4  # of a puzzle
    validation: Literal["new", "trained", "perturbed", "reordered"] = "new"
    train_examples: int = 1_000  # rows of the train split

    def __post_init__(self):
        super().__post_init__()
        require(3 <= self.people <= 8, f"people must lie in [3, 8], not {self.people}.")
        needed = 7 * self.people
        require(
            needed <= self.seq_len,
            f"seq_len {self.seq_len} is too short for {self.people} people; it needs at least {needed} tokens.",
        )

    @property
    def vocab_size(self) -> int:
        """Tokens: filler, two roles, five kinds of statement, the people."""
        return PERSON + self.people

    @property
    def chance(self) -> float:
        """Expected accuracy per person of guessing the role."""
        return 0.5

    def _examples(self, key, row):
        seed, split = key
        trained = split == 0 or self.validation != "new"
        key, row = ((seed, 0), row % self.train_examples) if trained else (key, row)
        puzzles = self._puzzles(key, row)
        if split and self.validation == "perturbed":
            puzzles = self._puzzles((seed, 2), row, puzzles)
        elif split and self.validation == "reordered":
            order = choose(hashing.bits(seed, 3, row, _ORDER, np.arange(self.people)), self.people)
            puzzles = np.take_along_axis(puzzles, order[..., None], axis=1)
        tokens = np.zeros((len(row), self.seq_len), np.int32)
        tokens[:, : 6 * self.people] = puzzles.reshape(len(row), 6 * self.people)
        tokens[:, 6 * self.people : 7 * self.people] = PERSON + np.arange(self.people)
        return tokens, self.solve(tokens)

    def _puzzles(self, key, row, base: Int[np.ndarray, "N P 6"] | None = None) -> Int[np.ndarray, "N P 6"]:
        """Puzzles with one solution; with `base`, those with another statement and another solution."""
        puzzles, pending, attempt = np.empty((len(row), self.people, 6), int), np.arange(len(row)), 0
        while len(pending):
            drawn = self._statements((*key, row[pending], attempt))
            if base is not None:
                place = hashing.bits(*key, row[pending], attempt, _WHO, np.arange(self.people)).argsort(axis=1)
                redrawn = place < 1 + attempt // PATIENCE
                drawn = np.where(redrawn[..., None], drawn, base[pending])
            worlds = self._worlds(drawn)
            good = np.bitwise_count(worlds).sum(axis=1) == 1
            if base is not None:
                good &= (worlds != self._worlds(base[pending])).any(axis=1)
            puzzles[pending[good]] = drawn[good]
            pending, attempt = pending[~good], attempt + 1
        return puzzles

    def _statements(self, keys: tuple) -> Int[np.ndarray, "N P 6"]:
        """One statement of each person, uniform."""
        speaker = np.arange(self.people)
        op, r, s = (first + hashing.integers(count, *keys, stream, speaker)
                    for first, count, stream in ((IS, 5, _OP), (KNIGHT, 2, _R), (KNIGHT, 2, _S)))  # fmt: skip
        a = 1 + hashing.integers(self.people - 1, *keys, _A, speaker)  # steps from the speaker, around the circle
        b = 1 + hashing.integers(self.people - 2, *keys, _B, speaker)
        b += b >= a
        a, b = (PERSON + (speaker + x) % self.people for x in (a, b))
        alone = op == IS
        parts = (np.broadcast_to(PERSON + speaker, op.shape), op, a, r, np.where(alone, 0, b), np.where(alone, 0, s))
        return np.stack(parts, axis=-1)

    @property
    def _knights(self) -> UInt64[np.ndarray, "P W"]:
        """For each person the worlds in which he is a knight: bit m of the words is world m of 2 ** people."""
        world = np.arange(max(64, 2**self.people)).reshape(-1, 64)
        is_knight = (world >> np.arange(self.people)[:, None, None] & 1).astype(np.uint64)
        return (is_knight << np.arange(64, dtype=np.uint64)).sum(axis=-1, dtype=np.uint64)

    def _worlds(self, puzzles: Int[np.ndarray, "N P 6"]) -> UInt64[np.ndarray, "N W"]:
        """The worlds in which everybody speaks as he is, one bit each."""
        speaker, op, a, r, b, s = np.moveaxis(puzzles, -1, 0)
        knights, op = self._knights, op[..., None]
        first = self._claim(knights, a, r)
        second = self._claim(knights, np.where(b == 0, PERSON, b), s)
        cases = [first, first & second, first | second, ~first | second]
        says = np.select([op == IS, op == AND, op == OR, op == IF], cases, ~(first ^ second))
        fits = ~(says ^ knights[speaker - PERSON])
        full = np.uint64(2 ** min(64, 2**self.people) - 1)
        return np.bitwise_and.reduce(fits, axis=1) & full

    def _claim(self, knights, person, role):
        """The worlds in which a person has a role."""
        return knights[person - PERSON] ^ np.where(role == KNAVE, ~np.uint64(0), np.uint64(0))[..., None]

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: at every question the role of the person in the one world that fits; elsewhere -1."""
        worlds = self._worlds(tokens[:, : 6 * self.people].astype(int).reshape(len(tokens), self.people, 6))
        knight = ((worlds[:, None] & self._knights) != 0).any(axis=-1)
        answers = np.full(tokens.shape, IGNORE, np.int32)
        answers[:, 6 * self.people : 7 * self.people] = np.where(knight, KNIGHT, KNAVE)
        return answers
