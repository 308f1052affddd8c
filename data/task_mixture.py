"""Several memory tasks in one training, with weights, lengths and curricula.

A row of the training is one example of one task. Row r of step s is a pure function of the loader's seed, s and r: its
task from a golden-ratio sequence, which keeps the shares within a few rows of the weights; its example by a hash, among
all train examples of the task. So any step can be read without those before it, by any number of processes.
"""

import dataclasses
import functools
import hashlib
import json
import math
from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float, Int, Int32

from engrax.data import curriculum as curricula
from engrax.data import hashing
from engrax.data.config import (
    DATASETS,
    IGNORE,
    SPLITS,
    Batch,
    DataConfig,
    Loader,
    Share,
    check_loader_arguments,
    padding_batch,
    require,
)
from engrax.data.curriculum import WEIGHT, Curriculum
from engrax.data.task import TaskConfig
from engrax.data.token_types import TokenTypes

_TASK, _EXAMPLE = range(2)  # the independent random streams of one row
_STEPS = 1 << 40  # of an endless loader


@DATASETS.register("task_mixture")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskMixture(DataConfig):
    """Tasks with weights: `TaskMixture(tasks=(MQAR(num_pairs=4), MQAR(num_pairs=8)), weights=(3, 1), seq_len=64)`.

    Shorter rows are padded to `seq_len`, without loss. Weights are shares of the training's rows. The validation split
    has every validation example of every task once, as the tasks are stated here: what a curriculum changes, it changes
    in training only.
    """

    even_epochs: ClassVar[bool] = False

    seq_len: int = 128  # tokens per row, at least those of the longest task
    tasks: tuple[DataConfig, ...] = ()  # generated tasks (`TaskConfig`), as they are at the end of the curriculum
    weights: tuple[float, ...] = ()  # share of each in the rows, in any unit
    curriculum: tuple[Curriculum, ...] = ()  # what changes in training
    tokens: Literal["shared", "separate"] = "shared"  # one vocabulary for all, or each task's behind the one before

    def __post_init__(self):
        super().__post_init__()
        require(len(self.tasks) > 0, "task_mixture needs tasks, and a weight for each.")
        require(
            len(self.tasks) == len(self.weights),
            f"task_mixture has {len(self.tasks)} tasks and {len(self.weights)} weights; give each task one.",
        )
        for weight in self.weights:
            require(0 < weight < math.inf, f"a weight must be positive and finite, not {weight}; leave the task out.")
        for i, task in enumerate(self.tasks):
            require(isinstance(task, TaskConfig), f"task {i} of task_mixture is no generated task; see docs/tasks.md.")
            require(
                self.tokens == "separate" or task.vocab_size == self.tasks[0].vocab_size,
                f"tasks 0 and {i} of task_mixture have {self.tasks[0].vocab_size} and {task.vocab_size} tokens; give "
                "them the same vocab_size, or the mixture tokens='separate'.",
            )
        curricula.check(self.curriculum, self.tasks)
        self._check_steps()

    def _check_steps(self) -> None:
        """Raises UserError unless the tasks fit at every step of the curriculum, and some weight is positive."""
        last = max((each.until[-1] for each in self.curriculum), default=0)
        steps = np.arange(last + 1)
        none = np.flatnonzero(self._weights_at(steps).sum(axis=1) == 0)
        require(not len(none), f"all weights of task_mixture are 0 at step {none[0] if len(none) else 0}.")
        for i, task in enumerate(self.tasks):
            names, values = curricula.fields_at(self._changes(i), task, steps)
            _, first = np.unique(values, axis=0, return_index=True)
            for step in np.sort(first):
                found = curricula.with_fields(task, names, values[step])
                which = f"task {i} ({task.registered_name}) of task_mixture, at step {step},"
                require(
                    found.seq_len <= self.seq_len,
                    f"{which} has rows of {found.seq_len} tokens, and the mixture of {self.seq_len}; set its seq_len "
                    f"to at least {found.seq_len}.",
                )
                require(
                    found.vocab_size <= task.vocab_size,
                    f"{which} has {found.vocab_size} tokens, more than its own {task.vocab_size}.",
                )

    def _changes(self, i: int) -> list[Curriculum]:
        return [each for each in self.curriculum if each.task == i]

    def _weights_at(self, steps: Int[np.ndarray, " N"]) -> Float[np.ndarray, "N tasks"]:
        weights = np.tile(np.asarray(self.weights, float), (len(steps), 1))
        for each in self.curriculum:
            if each.field == WEIGHT:
                weights[:, each.task] = each.at(steps, float(self.weights[each.task]))
        return weights

    def shares(self, step: int) -> Float[np.ndarray, " tasks"]:
        """The tasks' shares of the rows of a step, counted from 0."""
        weights = self._weights_at(np.array([step]))[0]
        return weights / weights.sum()

    def task_at(self, i: int, step: int) -> TaskConfig:
        """Task i as it is in the training's step `step`, counted from 0."""
        names, values = curricula.fields_at(self._changes(i), self.tasks[i], np.array([step]))
        return curricula.with_fields(self.tasks[i], names, values[0])

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' registered names, with their places where one occurs twice: mqar_0, mqar_2."""
        names = [task.registered_name for task in self.tasks]
        return tuple(name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names))

    @property
    def _starts(self) -> list[int]:
        """The first token of every task."""
        sizes = [task.vocab_size if self.tokens == "separate" else 0 for task in self.tasks]
        return [sum(sizes[:i]) for i in range(len(sizes))]

    @property
    def vocab_size(self) -> int:
        """The tokens of all tasks."""
        return self._starts[-1] + self.tasks[-1].vocab_size

    @property
    def tokenizer(self):
        """The tokenizer of tasks in words that share their tokens; else None."""
        return self.tasks[0].tokenizer if self.tokens == "shared" else None

    def digest(self) -> str:
        """Returns the SHA-256 of the fields and of the tasks' digests."""
        manifest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())
        manifest.update("\n".join(task.digest() for task in self.tasks).encode())
        return manifest.hexdigest()

    def about(self) -> list[tuple[str, str]]:
        """The tasks with their shares at the first and the last step, and their curricula."""
        first, last, rows = self.shares(0), self.shares(_STEPS), []
        for i, (name, task) in enumerate(zip(self.names, self.tasks)):
            share = f"{last[i]:.1%}" if first[i] == last[i] else f"{first[i]:.1%}, later {last[i]:.1%}"
            axes = ", ".join(f"{axis} {getattr(task, axis)}" for axis in dict.fromkeys(("seq_len", *task.axes)))
            rows.append((name, f"{share} of the rows; {axes}"))
            rows += [("  curriculum", str(each)) for each in self._changes(i)]
        return rows

    @functools.cached_property
    def _fixed(self) -> dict[str, tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]]:
        """(task, example) of every row of one pass over a split, the tasks spread evenly."""
        orders = {}
        for split in SPLITS:
            counts = [task.num_examples(split) for task in self.tasks]
            which = np.repeat(np.arange(len(counts)), counts)
            example = np.concatenate([np.arange(count) for count in counts])
            order = np.argsort((example + 0.5) / np.repeat(counts, counts), kind="stable")
            orders[split] = which[order], example[order]
        return orders

    def sources(self, rows: Int[np.ndarray, " N"]) -> TokenTypes:
        """See `DataConfig.sources`."""
        which, _ = self._fixed["validation"]
        return TokenTypes(self.names, np.where(rows < len(which), which[np.minimum(rows, len(which) - 1)], -1))

    @functools.cached_property
    def chance(self) -> float:
        """Expected accuracy of guessing on the validation split: the tasks', by their labelled positions."""
        labelled = [
            (task.generate("validation", np.arange(task.validation_examples))[1] != IGNORE).sum() for task in self.tasks
        ]
        return float(np.average([task.chance for task in self.tasks], weights=labelled))

    def solve(self, tokens: Int32[np.ndarray, "B T"], source: Int[np.ndarray, " B"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the answers of the oracles of the rows' tasks; `source` is the task of each row."""
        answers = np.full(tokens.shape, IGNORE, np.int32)
        for i, (task, start) in enumerate(zip(self.tasks, self._starts)):
            of = np.flatnonzero(source == i)
            answers[of, : task.seq_len] = _moved(task.solve(tokens[of, : task.seq_len] - np.int32(start)), start)
        return answers

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        epochs: int | None = None,
        align: int = 1,
    ) -> Loader:
        """See `DataConfig.loader`. An endless loader follows the curriculum, a batch is a step; the others do not. The
        position counts global batches."""
        import grain

        check_loader_arguments(self, split, seed, epochs, align)
        share = Share.of(batch_size, process_index, process_count)
        if epochs is None:
            batches = grain.MapDataset.range(_STEPS).map(lambda step: self._step(split, int(step), seed, share))
        else:
            rows = grain.MapDataset.range(len(self._fixed[split][0])).repeat(epochs)
            batches = rows.batch(batch_size).map(lambda index: self._pass(split, index, share))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def _step(self, split: str, step: int, seed: int, share: Share) -> Batch:
        """This process's rows of a step of the training."""
        row = step * share.batch_size + share.start + np.arange(share.rows)
        edges = self.shares(step).cumsum()[:-1]
        which = np.searchsorted(edges, _golden(row, seed, _TASK), side="right")
        tasks = [self.task_at(i, step) for i in range(len(self.tasks))]
        example = np.zeros(share.rows, np.int64)
        for i, task in enumerate(tasks):
            of = which == i
            example[of] = hashing.integers(task.num_examples(split), seed, _EXAMPLE, i, row[of])
        return self._batch(split, tasks, which, example, share)

    def _pass(self, split: str, index: Int[np.ndarray, " N"], share: Share) -> Batch:
        """This process's rows of a batch of a fixed pass."""
        mine = index[share.start : share.start + share.rows]
        which, example = (array[mine] for array in self._fixed[split])
        return self._batch(split, self.tasks, which, example, share)

    def _batch(self, split, tasks, which, example, share: Share) -> Batch:
        batch = padding_batch(share.rows, self.seq_len)
        for i, (task, start) in enumerate(zip(tasks, self._starts)):
            of = np.flatnonzero(which == i)
            if len(of):
                tokens, targets = task.generate(split, example[of])
                batch["tokens"][of, : task.seq_len] = tokens + start
                batch["targets"][of, : task.seq_len] = _moved(targets, start)
                batch["segment_ids"][of, : task.seq_len] = 0
        return batch


def _moved(answers: Int32[np.ndarray, "N T"], start: int) -> Int32[np.ndarray, "N T"]:
    return np.where(answers == IGNORE, IGNORE, answers + start).astype(np.int32)


def _golden(row: Int[np.ndarray, " N"], *keys: int) -> Float[np.ndarray, " N"]:
    """Numbers in [0, 1) whose every stretch is spread evenly: the multiples of the golden ratio, from a random one."""
    with np.errstate(over="ignore"):
        found = row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + hashing.bits(*keys)
    return (found >> np.uint64(11)).astype(np.float64) * 2.0**-53
