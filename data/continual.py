"""A continual stream: several tasks, one after the other, each with its own tokens.

The train split is `tasks` in order, with an equal part of the rows each, and the loader keeps this order; it shuffles
within each part. Row i of the validation split is of task i mod the number of tasks, so that every evaluation sees all
tasks. The tokens of task j are shifted behind those of the tasks before it: nothing is shared. Accuracies by slice
("task 0", "task 1", ...) at several steps give the stability gap, see `engrax.evals.continual`.
"""

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Int, Int32, Int64

from engrax.data import hashing
from engrax.data.config import DATASETS, IGNORE, Batch, require
from engrax.data.mqar import MQAR
from engrax.data.task import TaskConfig
from engrax.data.token_types import TokenTypes


@DATASETS.register("continual")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Continual(TaskConfig):
    """Several tasks in a row, each with tokens of its own."""

    axes: ClassVar[tuple[str, ...]] = ()  # those of its tasks

    seq_len: int = 64  # tokens per row, of every task
    tasks: tuple[TaskConfig, ...] = (MQAR(), MQAR(), MQAR())  # equal ones are different in tokens and examples

    def __post_init__(self):
        super().__post_init__()
        require(len(self.tasks) >= 1, "continual needs tasks, one at least.")
        for task in self.tasks:
            require(
                task.seq_len == self.seq_len,
                f"the task {task.registered_name} of continual has seq_len {task.seq_len}, the stream {self.seq_len}; "
                "make them equal.",
            )
        require(
            len(self.tasks) <= min(self.train_examples, self.validation_examples),
            f"train_examples {self.train_examples} and validation_examples {self.validation_examples} must be at least "
            f"the number of tasks, {len(self.tasks)}.",
        )

    @property
    def _starts(self) -> Int64[np.ndarray, " tasks"]:
        """The first token of every task."""
        return np.cumsum([0, *(task.vocab_size for task in self.tasks[:-1])])

    @property
    def vocab_size(self) -> int:
        """The tokens of all tasks."""
        return sum(task.vocab_size for task in self.tasks)

    @property
    def chance(self) -> float:
        """The mean over tasks of their accuracies of guessing: exact if they have equally many labels."""
        return float(np.mean([task.chance for task in self.tasks]))

    def token_types(self, batch: Batch) -> TokenTypes:
        """The task of a row."""
        index = np.broadcast_to(self._of(batch["tokens"])[:, None], batch["tokens"].shape)
        return TokenTypes(tuple(f"task {i}" for i in range(len(self.tasks))), index)

    def _of(self, tokens: Int[np.ndarray, "N T"]) -> Int[np.ndarray, " N"]:
        """The task of each row, from its tokens."""
        return np.searchsorted(self._starts, tokens[:, 0], side="right") - 1

    def _parts(self, split: str) -> Int64[np.ndarray, " edges"]:
        """Where the parts of the train split begin and end."""
        return np.arange(len(self.tasks) + 1) * self.num_examples(split) // len(self.tasks)

    def _examples(self, key, row):
        seed, split = key
        if split == 0:
            which = np.searchsorted(self._parts("train"), row[:, 0], side="right") - 1
        else:
            which = row[:, 0] % len(self.tasks)
        tokens = np.empty((len(row), self.seq_len), np.int32)
        targets = np.empty_like(tokens)
        for i, task in enumerate(self.tasks):
            of = which == i
            if not of.any():
                continue
            shown, asked = task._examples((hashing.seed32(seed, task.seed), split), row[of])
            tokens[of] = shown + self._starts[i]
            targets[of] = np.where(asked == IGNORE, IGNORE, asked + self._starts[i])
        return tokens, targets

    def _shuffled(self, order, seed):
        import grain

        parts = self._parts("train").tolist()
        shuffled = (order[a:b].shuffle(seed=hashing.seed32(seed, a)) for a, b in zip(parts[:-1], parts[1:]))
        return grain.MapDataset.concatenate(list(shuffled))

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the oracles of the tasks that the rows are of."""
        which, answers = self._of(tokens), np.full(tokens.shape, IGNORE, np.int32)
        for i, task in enumerate(self.tasks):
            solved = task.solve(tokens[which == i] - self._starts[i].astype(np.int32))
            answers[which == i] = np.where(solved == IGNORE, IGNORE, solved + self._starts[i])
        return answers
