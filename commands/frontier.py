"""`engrax frontier`: recall of every mixer against its state's bytes and its speed."""

import argparse
import shlex

from engrax.commands.common import add_running, load_plugins, parser_of, tell_missing
from engrax.flags import filled, override, positive

EXAMPLE = "engrax frontier mqar --mixers deltanet,gla,titans --minutes 60 --processes 2"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code: 1 if a training is missing."""
    parser = parser_of(
        "frontier",
        EXAMPLE,
        "Trains every mixer with states of several sizes, equal in all else, on a generated task, and tabulates and "
        "plots recall against bytes of state and against speed. Continues after an interruption. Any field of all "
        "experiments is a flag: --data.num-pairs 16 --steps 500.",
    )
    parser.add_argument("task", type=filled, help="a generated task, first of all (default: mqar)")
    parser.add_argument("--mixers", metavar="NAMES", type=_names, help="with commas between (default: the preset's)")
    parser.add_argument("--preset", default="quick", help="quick (an hour of two cores) or full (default: quick)")
    parser.add_argument("--sizes", metavar="BYTES", type=_sizes, help="of a layer's state, with commas between")
    parser.add_argument("--folder", type=filled, help="where runs and tables go (default: runs/frontier_TASK_PRESET)")
    add_running(parser)
    task = [] if args and not args[0].startswith("-") else ["mqar"]  # the value of a field's flag is no task
    known, rest = parser.parse_known_args(task + args)
    import dataclasses

    from engrax.evals import frontier, frontier_report

    load_plugins(known.plugin)
    chosen = frontier.setting(known.task, known.mixers, known.preset)
    experiment = override(chosen.experiment, rest, f"engrax frontier {known.task}")
    chosen = dataclasses.replace(chosen, experiment=experiment, sizes=known.sizes or chosen.sizes)
    found = frontier_report.frontier(
        chosen,
        known.folder or f"runs/frontier_{known.task}_{known.preset}",
        processes=known.processes,
        minutes=known.minutes,
        command=shlex.join(["engrax", "frontier", *args]),
    )
    print(found.markdown)
    print(f"The table, its numbers, its plot and the page are in {found.directory}")
    return tell_missing(found.missing)


def _names(text: str) -> list[str]:
    """Names with commas between."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("it names nothing; give names with commas between")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    """Counts of bytes with commas between."""
    return tuple(positive(part) for part in _names(text))
