"""`engrax train`: trains a config, or resumes a run."""

import dataclasses
import os
import sys
from typing import Any

from engrax.commands.common import find_config, is_main, parser_of, split_help
from engrax.errors import Exit
from engrax.flags import filled, override

EXAMPLE = "engrax train quickstart --run-dir runs/quickstart --steps 500 --model.mixers.0.heads 8"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code. An error in one of several processes ends all of them."""
    if os.environ.get("ENGRAX_DISTRIBUTED") != "1":
        return _train(args)
    from engrax.train import distributed

    distributed.start()
    with distributed.together():
        return _train(args)


def _train(args: list[str]) -> int:
    parser = parser_of(
        "train",
        EXAMPLE,
        "Trains a config, resuming the run that the folder holds. Any field is a flag: --optimizer.learning-rate 1e-3. "
        "Exit codes: " + ", ".join(f"{code.value} {code.name.lower()}" for code in Exit) + " (docs/machines.md).",
    )
    parser.add_argument(
        "config", type=filled, help="a name that `engrax list` shows, a .py file with config(), or a run to resume"
    )
    parser.add_argument("--run-dir", type=filled, help="the run folder (default: runs/CONFIG)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers a run's own mixers")
    known, rest = split_help(parser, args, EXAMPLE)
    from engrax import plugins, train

    for path in known.plugin:
        plugins.load(path)
    source = find_config(known.config)
    experiment = override(source.experiment, rest, f"engrax train {known.config}")
    if source.run_dir and experiment.parallel == source.experiment.parallel:
        experiment = _on_these_devices(experiment)
    run_dir = known.run_dir or source.run_dir or f"runs/{source.name}"
    result = train(experiment, run_dir, source=source.path)
    if result.finished and is_main():
        print(f"finished step {result.step}: {result.run_dir} (next: engrax evaluate {result.run_dir})")
    if result.finished:
        return Exit.FINISHED
    return Exit.INTERRUPTED if result.interrupted else Exit.STOPPED


def _on_these_devices(experiment: Any) -> Any:
    """The experiment, with a mesh of this machine's devices if its own mesh does not fit."""
    import jax

    from engrax.train import sharding

    parallel = sharding.fitting(experiment.parallel, jax.device_count())
    if parallel != experiment.parallel and is_main():
        old, new = (
            " ".join(f"--parallel.{name} {getattr(p, name)}" for name in sharding.sizes(p, 1))
            for p in (experiment.parallel, parallel)
        )
        print(
            f"trained with {old}; on {jax.device_count()} device(s) it continues with {new}",
            file=sys.stderr,
        )
    return dataclasses.replace(experiment, parallel=parallel)
