"""`engrax sweep`: trains a config at many settings."""

import shlex
from typing import Any

from engrax.commands.common import add_running, find_config, load_plugins, parser_of, split_help, tell_missing
from engrax.errors import UserError
from engrax.flags import filled, override, positive

EXAMPLE = "engrax sweep mqar_titans --grid optimizer.learning-rate=1e-3,3e-3 --random model.dim=32:128:log --trials 8"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code: 1 if a trial has no score."""
    parser = parser_of(
        "sweep",
        EXAMPLE,
        "Trains a config at every setting of a grid, or at random ones, and writes one table and one plot. Continues "
        "after an interruption. Any field of all trials is a flag: --steps 300.",
    )
    parser.add_argument("config", type=filled, help="a name that `engrax list` shows, a .py file, or a run folder")
    add = parser.add_argument
    add("--grid", action="append", default=[], metavar="FIELD=VALUE,VALUE", help="every combination of these values")
    add("--random", action="append", default=[], metavar="FIELD=LOW:HIGH[:log]", help="numbers drawn from this range")
    add("--trials", type=positive, help="draws of a random search (at every point of the grid)")
    add("--seeds", type=positive, default=1, help="trainings of each setting (default: 1)")
    add("--folder", type=filled, help="where its runs, table and plot go (default: runs/CONFIG_sweep)")
    add_running(parser)
    known, rest = split_help(parser, args, EXAMPLE)
    from engrax.evals import search

    load_plugins(known.plugin)
    source = find_config(known.config)
    prog = f"engrax sweep {known.config}"
    experiment = override(source.experiment, rest, prog)
    found = search.search(
        experiment,
        known.folder or f"runs/{source.name}_sweep",
        grid=dict(_grid(experiment, text, prog) for text in known.grid),
        random=dict(_range(experiment, text, prog) for text in known.random),
        trials=known.trials,
        seeds=known.seeds,
        processes=known.processes,
        minutes=known.minutes,
        rerun=["engrax", "train", known.config, *rest, *(word for path in known.plugin for word in ("--plugin", path))],
        command=shlex.join(["engrax", "sweep", *args]),
    )
    print(found.markdown)
    print(f"The table, its numbers and its plot are in {found.directory}")
    return tell_missing(found.missing)


def _grid(experiment: Any, text: str, prog: str) -> tuple[str, tuple]:
    """(field, its values) of FIELD=VALUE,VALUE."""
    field, values = _split(text, "--grid FIELD=VALUE,VALUE")
    return field, tuple(dict.fromkeys(_value(experiment, field, value, prog) for value in values.split(",")))


def _range(experiment: Any, text: str, prog: str) -> tuple[str, Any]:
    """(field, its range) of FIELD=LOW:HIGH[:log]."""
    from engrax.evals.search import Range

    field, values = _split(text, "--random FIELD=LOW:HIGH[:log]")
    parts = values.split(":")
    if len(parts) not in (2, 3) or parts[2:] not in ([], ["log"]):
        raise UserError(f"--random {text} is no range; write FIELD=LOW:HIGH or FIELD=LOW:HIGH:log.")
    low, high = (_value(experiment, field, part, prog) for part in parts[:2])
    return field, Range(low, high, log=len(parts) == 3)


def _split(text: str, form: str) -> tuple[str, str]:
    field, _, values = text.partition("=")
    if not field or not values:
        raise UserError(f"{text!r} is not of the form {form}.")
    return field.removeprefix("--").replace("-", "_"), values


def _value(experiment: Any, field: str, text: str, prog: str) -> Any:
    """The text as the field's value, read as the field's own flag is."""
    config = override(experiment, [f"--{field.replace('_', '-')}={text}"], prog)
    for name in field.split("."):
        config = config[int(name)] if isinstance(config, tuple) else getattr(config, name)
    return config
