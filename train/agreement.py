"""Several processes compare what must be equal before any of them writes."""

import itertools
import json
from typing import Any

import jax

from engrax.errors import UserError
from engrax.train import distributed, run_sources
from engrax.train import experiment as experiments
from engrax.train.experiment import Experiment

_round = itertools.count()  # every process makes the same comparisons in the same order
SHOWN = 4  # most differences that a message names


def check_experiment(experiment: Experiment, run_dir: Any, saved: int, source: Any) -> None:
    """Raises UserError in every process if they have other fields, run folders, newest checkpoints (`saved`) or files
    of the user. Paths of data may differ: `runs.prepare` compares the data."""
    if distributed.processes()[1] == 1:
        return
    fields = _flat(experiments.to_dict(experiment))
    moved = [n for n in fields if n.startswith("data.") and experiments.PATH.search(n.split(".")[-1])]
    facts = {name: value for name, value in fields.items() if name not in moved}
    facts |= {"run folder": str(run_dir), "newest checkpoint": saved}
    check(facts | {"the user's files": run_sources.digest(experiment, source)})


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """{dotted name: value} of a tree of dictionaries and lists."""
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {k: v for n, part in items for k, v in _flat(part, f"{path}.{n}" if path else str(n)).items()}
    return {path: tree}


def check(facts: dict[str, Any]) -> None:
    """Raises the same UserError in every process if their facts differ, naming which. With one process it does nothing.

    Process 0 compares: a process reads one entry of the key-value store, not one of every other.
    """
    me, number = distributed.processes()
    if number == 1:
        return
    place = f"engrax/agreement/{next(_round)}"
    distributed.store().key_value_set(f"{place}/{me}", json.dumps(facts))
    if me == 0:
        verdict = "; ".join(filter(None, (differences(facts, _get(f"{place}/{i}"), i) for i in range(1, number))))
        distributed.store().key_value_set(f"{place}/verdict", json.dumps(verdict))
    if verdict := _get(f"{place}/verdict"):
        raise UserError(f"the processes differ: {verdict}. Start all with the same command, data and versions.")


def differences(ours: dict[str, Any], theirs: dict[str, Any], process: int) -> str:
    """What process 0 and another differ in, as part of a sentence; "" if they agree."""
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    told = [f"{name} ({_short(theirs.get(name))}, not {_short(ours.get(name))})" for name in names[:SHOWN]]
    more = [f"{len(names) - SHOWN} more"] * (len(names) > SHOWN)
    return f"process {process} in {', '.join(told + more)}" if names else ""


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _get(key: str) -> Any:
    """The value of a key, once another process has set it. Waits in short turns, between which Ctrl-C is heard; a lost
    process ends this one."""
    while True:
        try:
            return json.loads(distributed.store().blocking_key_value_get(key, 1000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
