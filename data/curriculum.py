"""Curricula of a mixture of tasks: weights, lengths and difficulties as pure functions of the step."""

import dataclasses
import math
import numbers
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from engrax.data.config import require
from engrax.data.task import TaskConfig
from engrax.registry import did_you_mean

WEIGHT = "weight"  # the field of a curriculum that is no field of a task


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """One number of one task until it has the value that the mixture states: `values[i]` begins at `until[i - 1]`.

    `Curriculum(0, "num_pairs", values=(2, 4), until=(500, 1000), shape="stages")` has 2 pairs in the steps [0, 500),
    4 in [500, 1000), then the task's own number. The shape "linear" goes straight from value to value: from 2 at step
    0 to 4 at step 500 and the task's own number at step 1000. Steps count from 0.
    """

    task: int  # its place in the mixture's tasks
    field: str  # "weight", or a field of the task that is a number, such as "num_pairs", "seq_len" or "noise"
    values: tuple[float, ...]  # the values before the last one
    until: tuple[int, ...]  # the step at which each of them ends, ascending
    shape: Literal["linear", "stages"] = "linear"
    multiple: int = 1  # whole numbers are rounded to multiples of it

    def __post_init__(self):
        name = f"the curriculum of {self.field} of task {self.task}"
        require(
            0 < len(self.values) == len(self.until),
            f"{name} has {len(self.values)} values and {len(self.until)} steps in until; give at least one of each, "
            "and a step for each value.",
        )
        steps = (0, *self.until)
        require(
            all(a < b for a, b in zip(steps, steps[1:])),
            f"{name} has until={self.until}; give steps that are positive and ascend.",
        )
        require(
            all(math.isfinite(value) and value >= 0 for value in self.values),
            f"{name} has values={self.values}; give finite numbers that are not negative.",
        )
        require(self.multiple >= 1, f"{name} has multiple={self.multiple}; it must be at least 1.")

    def at(self, steps: Int[np.ndarray, " N"], last: float) -> Float[np.ndarray, " N"]:
        """The value at every step; `last` is the one that the mixture states. Of whole numbers it is whole."""
        points = (*self.values, last)
        if self.shape == "linear":
            found = np.interp(steps, (0, *self.until), points)
        else:
            found = np.asarray(points, float)[np.searchsorted(self.until, steps, side="right")]
        if isinstance(last, int):
            found = np.rint(found / self.multiple) * self.multiple
        return np.where(steps >= self.until[-1], last, found)

    def __str__(self) -> str:
        join = " to " if self.shape == "linear" else ", "
        names = (f"{value:g} at step {step}" for value, step in zip(self.values, (0, *self.until)))
        return f"{self.field} {join.join(names)}, its own from step {self.until[-1]}"


def check(curricula: Sequence[Curriculum], tasks: Sequence[TaskConfig]) -> None:
    """Raises UserError if a curriculum names what no task has, or what another one changes already."""
    seen = set()
    for each in curricula:
        require(
            0 <= each.task < len(tasks),
            f"a curriculum is of task {each.task}, and the mixture has the tasks 0 to {len(tasks) - 1}.",
        )
        require(
            (each.task, each.field) not in seen,
            f"two curricula change {each.field} of task {each.task}; give one the values of both.",
        )
        seen.add((each.task, each.field))
        task = tasks[each.task]
        fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
        known = [name for name, value in fields.items() if is_number(value)] + [WEIGHT]
        require(
            each.field in known,
            f"a curriculum changes {each.field}, which is no number of task {each.task} ({task.registered_name})"
            f"{did_you_mean(each.field, known) or '.'}",
        )


def is_number(value: object) -> bool:
    """Whether the value is a number that a curriculum can change."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def fields_at(
    curricula: Sequence[Curriculum], task: TaskConfig, steps: Int[np.ndarray, " N"]
) -> tuple[tuple[str, ...], Float[np.ndarray, "N fields"]]:
    """The fields of one task that its curricula change, and their values at the steps."""
    changed = [each for each in curricula if each.field != WEIGHT]
    values = [each.at(steps, getattr(task, each.field)) for each in changed]
    return tuple(each.field for each in changed), np.stack(values, axis=1) if values else np.zeros((len(steps), 0))


def with_fields(task: TaskConfig, names: Sequence[str], values: Float[np.ndarray, " fields"]) -> TaskConfig:
    """The task with these values, whole where its own are. Raises UserError as the task does."""
    given = {name: type(getattr(task, name))(value) for name, value in zip(names, values)}
    return dataclasses.replace(task, **given)
