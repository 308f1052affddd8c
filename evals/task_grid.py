"""The settings that an evaluation on generated tasks tries: one grid per task, checked before anything is computed."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from engrax.data.config import DATASETS
from engrax.data.continual import Continual
from engrax.data.task import TaskConfig
from engrax.data.task_mixture import TaskMixture
from engrax.data.text_task import TextTask
from engrax.errors import UserError
from engrax.models.block_style import BlockStyleConfig
from engrax.models.segment_config import SegmentRecurrentConfig
from engrax.registry import did_you_mean
from engrax.train.experiment import Experiment, from_dict, nested_configs, to_dict
from engrax.train.run_sources import tokenizer_files

MULTIPLES = (1, 2, 4)  # of the training's row length, if no lengths are given
LENGTH = "seq_len"

Values = tuple[Any, ...]  # one value of every varied field


@dataclasses.dataclass(frozen=True)
class Grid:
    """One task with all combinations of the values of its varied fields."""

    name: str
    varied: dict[str, Values]  # the values of each varied field; the length is always there, and first
    cells: dict[Values, TaskConfig]  # the combinations that fit
    refused: dict[Values, str]  # the others, and why

    def values(self, cell: Values) -> dict[str, Any]:
        """A cell's values by field."""
        return dict(zip(self.varied, cell))


def grids(
    experiment: Experiment,
    tasks: Sequence[str | TaskConfig] = (),
    lengths: Sequence[int] = (),
    fields: dict[str, Values] | None = None,
) -> list[Grid]:
    """The grids of the named tasks (none = the run's own), at row lengths and with fields of several values.

    The run's own task, or each of its mixture, has the run's settings; other tasks have its `vocab_size`. A field
    counts for the tasks that have it. Without lengths, a task whose axes include the length has MULTIPLES of the
    training's, as far as they fit.

    Raises UserError for an unknown task or field, a value that fits nowhere, a length that the model cannot read, and
    a model with another vocabulary.
    """
    fields = fields or {}
    own = _own(experiment)
    bases = [_base(experiment, own, task) for task in tasks or _default_tasks(experiment, own)]
    names = [base["type"].partition(":")[2] for base in bases]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"the task {name} is named twice; name it once.")
    if LENGTH in fields:
        raise UserError(f"{LENGTH} is the length of a row; give it as lengths.")
    for field in fields:
        known = sorted({known for base in bases for known in base if known != "type"})
        if field not in known:
            raise UserError(f"no task named here has a field {field!r}{did_you_mean(field, known) or '.'}")
    found = [_grid(experiment, base, lengths, {k: v for k, v in fields.items() if k in base}) for base in bases]
    for grid in found:
        _check_model(experiment, grid)
    return found


def _own(experiment: Experiment) -> dict[str, TaskConfig]:
    """The tasks that the run was trained on, by name; of several with one name, the last."""
    data = experiment.data
    if isinstance(data, TaskMixture) and data.tokens == "separate":
        raise UserError(
            "the run was trained on a task_mixture with separate tokens, which a single task does not have; evaluate "
            "it without tasks: --only sources."
        )
    tasks = data.tasks if isinstance(data, TaskMixture) else (data,)
    return {task.registered_name: task for task in tasks if isinstance(task, TaskConfig)}


def _default_tasks(experiment: Experiment, own: dict[str, TaskConfig]) -> list[str]:
    if not own:
        raise UserError(
            f"the run was trained on {experiment.data.registered_name}, which is no generated task; name tasks, for "
            "example --tasks mqar."
        )
    return list(own)


def _base(experiment: Experiment, own: dict[str, TaskConfig], task: str | TaskConfig) -> dict[str, Any]:
    """A task's settings before anything varies, as `to_dict` writes them."""
    if isinstance(task, TaskConfig):
        return to_dict(task)
    known = [name for name, cls in DATASETS.items() if issubclass(cls, TaskConfig)]
    if task not in known:
        raise UserError(f"unknown task {task!r}{did_you_mean(task, known)} (known: {', '.join(known)}).")
    if task in own:
        return to_dict(own[task])
    base = to_dict(DATASETS[task]())
    if issubclass(DATASETS[task], TextTask):
        base["tokenizer_file"] = next(iter(tokenizer_files(experiment)), None)
    if "vocab_size" in base and own:
        base["vocab_size"] = experiment.data.vocab_size
    return base


def _grid(experiment: Experiment, base: dict[str, Any], lengths: Sequence[int], fields: dict[str, Values]) -> Grid:
    name = base["type"].partition(":")[2]
    given = tuple(sorted(set(lengths)))
    varied = {LENGTH: given or _default_lengths(experiment, base)}
    varied |= {field: tuple(dict.fromkeys(values)) for field, values in fields.items()}
    cells, refused = {}, {}
    for values in itertools.product(*varied.values()):
        try:
            cells[values] = _task(base, dict(zip(varied, values)))
            if isinstance(cells[values], TextTask):
                cells[values].check()
        except UserError as error:
            cells.pop(values, None)
            refused[values] = str(error)
    if not given and cells:  # a default length need not fit
        varied[LENGTH] = tuple(length for length in varied[LENGTH] if any(length == values[0] for values in cells))
        refused = {values: why for values, why in refused.items() if values[0] in varied[LENGTH]}
    for place, values in enumerate(varied.values()):
        for value in values:
            if not any(cell[place] == value for cell in cells):
                why = next(why for cell, why in refused.items() if cell[place] == value)
                raise UserError(f"the task {name} does not fit: {why}")
    return Grid(name, varied, cells, refused)


def _default_lengths(experiment: Experiment, base: dict[str, Any]) -> Values:
    cls = DATASETS[base["type"].partition(":")[2]]
    if LENGTH not in cls.axes and not issubclass(cls, Continual):
        return (base[LENGTH],)
    most, _ = most_tokens(experiment.model)
    wanted = [experiment.data.seq_len * factor for factor in MULTIPLES]
    return tuple(length for length in wanted if most is None or length <= most) or (wanted[0],)


def _task(base: dict[str, Any], values: dict[str, Any]) -> TaskConfig:
    """The task with these values; those in a stream have its length. Raises UserError if they do not fit."""
    changed = base | {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    if "tasks" in changed:
        changed["tasks"] = [inner | {LENGTH: values[LENGTH]} for inner in changed["tasks"]]
    return from_dict(changed, TaskConfig, base["type"].partition(":")[2])


def _check_model(experiment: Experiment, grid: Grid) -> None:
    """Raises UserError if the run's model cannot read the grid's rows."""
    in_words = issubclass(DATASETS[grid.name], TextTask)
    if in_words and experiment.data.tokenizer is None:
        raise UserError(
            f"{grid.name} is a task in words, and the run was trained on {experiment.data.registered_name}, whose "
            "tokens are no text; evaluate a run that reads text."
        )
    if not in_words and experiment.data.tokenizer is not None:
        raise UserError(
            f"the run reads text through its tokenizer, and the tokens of {grid.name} are no text; such tasks "
            "need a run that was trained on a generated task."
        )
    vocab = getattr(experiment.model, "vocab_size", None)
    most, what = most_tokens(experiment.model)
    for task in grid.cells.values():
        if vocab is not None and task.vocab_size > vocab:
            hint = f"set its vocab_size to {vocab} or less" if grid.name != "continual" else "choose other tasks for it"
            raise UserError(
                f"{grid.name} has {task.vocab_size} tokens, and the vocabulary of the run {vocab}; {hint}, or evaluate "
                "a run with a larger vocabulary."
            )
        if most is not None and task.seq_len > most:
            raise UserError(f"rows of {task.seq_len} tokens exceed {what}; choose lengths up to {most}.")


def most_tokens(model: Any) -> tuple[int | None, str]:
    """(the most tokens of a row that a model of this config reads, what limits them); None = any number."""
    found = []
    for part in nested_configs(model, skip=SegmentRecurrentConfig):  # these read segment by segment
        if isinstance(part, BlockStyleConfig) and part.positions:
            found.append((part.positions, f"the model's {part.positions} learned positions"))
        if hasattr(part, "capacity") and getattr(part, "window", None) is None:
            name = getattr(part, "registered_name", type(part).__name__)
            found.append((part.capacity, f"capacity={part.capacity} of the run's {name} cache"))
    return min(found, default=(None, ""))
