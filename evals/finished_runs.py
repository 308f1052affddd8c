"""Finished runs as the rows of a comparison: their last checkpoints, scored on the same validation rows."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from engrax.errors import Diverged, UserError
from engrax.evals import scoring, trials
from engrax.evals.comparison import Row
from engrax.train import cost, runs
from engrax.train import experiment as experiments
from engrax.train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class Finished:
    """What `verdicts.judge` asks of a comparison."""

    experiments: dict[str, Experiment]  # by their names in the table; the first is the baseline
    differing: list[str]  # the fields in which they differ, seeds and the model apart
    claims: tuple = ()


def rows_of(paths: Sequence[epath.PathLike]) -> tuple[Finished, list[Row]]:
    """The comparison and its rows, in the order of the paths. Runs that differ only in their seed share a row.

    Raises UserError if there are fewer than two rows, if runs differ in their data, or if one is given twice.
    """
    opened = [runs.open_run(path) for path in paths]
    groups: dict[str, list[runs.Run]] = {}
    for run in opened:
        _refuse_other_data(opened[0], run)
        same = groups.setdefault(_but_for_seed(run.experiment), [])
        if twin := next((other for other in same if other.experiment.seed == run.experiment.seed), None):
            raise UserError(f"{twin.directory} and {run.directory} are the same training with the same seed.")
        same.append(run)
    if len(groups) < 2:
        raise UserError("a comparison needs runs of at least two experiments (seeds of one experiment are one row).")
    rows = scoring.validation_rows(opened[0].experiment, None)
    names = [_name(group, opened) for group in groups.values()]
    found = []
    for name, group in zip(names, groups.values()):
        scores = tuple(_measure(run, rows) for run in group)
        experiment = group[0].experiment
        found.append(Row(name, experiment.optimizer.learning_rate, {}, scores, cost.costs(experiment)))
    for row in found:
        if all(score.sums is None for score in row.scores):
            raise UserError(f"{row.name} has no finite loss on the validation rows; leave it out.")
    differing = [_shared(group[0].experiment) for group in groups.values()]
    names_of = sorted({name for other in differing[1:] for name in experiments.differences(differing[0], other)})
    return Finished({name: group[0].experiment for name, group in zip(names, groups.values())}, names_of), found


def _measure(run: runs.Run, rows: scoring.Rows) -> trials.Score:
    try:
        return trials.measure(run.directory, rows)
    except Diverged:
        return trials.Score(None, None)


def _refuse_other_data(first: runs.Run, run: runs.Run) -> None:
    """Raises UserError unless the runs' validation rows are the same."""
    one, two = ({"data": experiments.to_dict(r.experiment.data), "align": r.experiment.align} for r in (first, run))
    names = experiments.differences(one, two)
    if not names and first.environment.get("data_digest") != run.environment.get("data_digest"):
        names = ["the content of the data"]
    if names:
        raise UserError(f"{first.directory} and {run.directory} differ in {', '.join(names)}: no comparison.")


def _shared(experiment: Experiment) -> dict[str, Any]:
    """The fields of a comparison's experiments that are the same in a fair one, the learning rate apart."""
    fields = experiments.to_dict(experiment)
    return {name: fields[name] for name in ("steps", "batch_size", "compute_dtype", "init_from", "carry_memory")}


def _but_for_seed(experiment: Experiment) -> str:
    fields = experiments.to_dict(experiment)
    return json.dumps({k: v for k, v in fields.items() if k != "seed" and k not in experiments.RUN_TIME_FIELDS})


def _name(group: list[runs.Run], opened: list[runs.Run]) -> str:
    """The end of the first run's path that no other run has."""
    parts = group[0].directory.parts
    others = [run.directory.parts for run in opened if run is not group[0]]
    for length in range(1, len(parts)):
        if all(other[-length:] != parts[-length:] for other in others):
            return "/".join(parts[-length:])
    return str(group[0].directory)
