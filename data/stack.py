"""Stack, a task of Kimi Linear (arXiv 2510.26692): push to and pop from many stacks.

    PUSH s x      POP s x        target at the s of a POP: x, the element pushed last on stack s

Each operation is on a stack drawn uniformly. If that is empty it is a PUSH of a uniform element, else either with equal
probability. Tokens: 0 fills the row after its last whole operation, PUSH is 1, POP is 2, then S stacks and the
elements. The paper has 64 stacks.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int32

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, require
from engrax.data.task import TaskConfig, earlier

PUSH, POP = 1, 2
_STACKS, _POPS, _ELEMENTS = range(3)  # the independent random streams of one example


@DATASETS.register("stack")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack(TaskConfig):
    """Many stacks: a POP asks for the element pushed last."""

    axes: ClassVar[tuple[str, ...]] = ("num_stacks", "seq_len", "vocab_size")

    seq_len: int = 128  # tokens per row, three per operation
    num_stacks: int = 8  # stacks
    vocab_size: int = 64  # tokens: filler, PUSH, POP, the stacks and the elements

    def __post_init__(self):
        super().__post_init__()
        require(self.num_stacks >= 1, f"num_stacks must be at least 1, not {self.num_stacks}.")
        require(self.seq_len >= 6, f"seq_len of stack must be at least 6, two operations, not {self.seq_len}.")
        least = self.num_stacks + 4
        require(self.vocab_size >= least, f"vocab_size {self.vocab_size} has no element; it needs at least {least}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the elements."""
        return 1.0 / (self.vocab_size - 3 - self.num_stacks)

    def _examples(self, key, row):
        count, rows = self.seq_len // 3, np.arange(len(row))
        draw = {s: (*key, row, s, np.arange(count)) for s in (_STACKS, _POPS, _ELEMENTS)}
        stacks = hashing.integers(self.num_stacks, *draw[_STACKS])
        pops = hashing.integers(2, *draw[_POPS]) == 1
        elements = 3 + self.num_stacks + hashing.integers(self.vocab_size - 3 - self.num_stacks, *draw[_ELEMENTS])
        top = np.full((len(row), self.num_stacks), -1)  # the operation that pushed a stack's top element
        under = np.empty((len(row), count), int)  # the top before each operation
        for i in range(count):
            under[:, i] = before = top[rows, stacks[:, i]]
            pops[:, i] &= before >= 0
            elements[:, i] = np.where(pops[:, i], elements[rows, before], elements[:, i])
            top[rows, stacks[:, i]] = np.where(pops[:, i], under[rows, before], i)
        tokens = np.zeros((len(row), self.seq_len), np.int32)
        targets = np.full(tokens.shape, IGNORE, np.int32)
        whole = np.stack([np.where(pops, POP, PUSH), 3 + stacks, elements], axis=-1)
        tokens[:, : 3 * count] = whole.reshape(len(row), 3 * count)
        targets[:, 1 : 3 * count : 3] = np.where(pops, elements, IGNORE)
        return tokens, targets

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: a POP takes the element of the nearest PUSH of its stack at its depth; elsewhere -1."""
        operation, stack, element = (tokens[:, i : self.seq_len // 3 * 3 : 3] for i in range(3))
        change = np.where(operation == PUSH, 1, -1)[..., None] * (stack[..., None] == 3 + np.arange(self.num_stacks))
        depth = np.take_along_axis(change.cumsum(axis=1), stack[..., None].astype(int) - 3, axis=2)[..., 0]
        codes = stack * self.seq_len + depth + (operation == POP)  # a PUSH reaches the depth that its POP leaves
        pushed = earlier(codes, operation == PUSH)
        answers = np.full(tokens.shape, IGNORE, np.int32)
        found = np.where((operation == POP) & (pushed >= 0), np.take_along_axis(element, pushed, axis=1), IGNORE)
        answers[:, 1 : self.seq_len // 3 * 3 : 3] = found
        return answers
