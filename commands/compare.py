"""`engrax compare`: trains and tabulates a comparison."""

import dataclasses
import shlex

from engrax.commands.common import add_running, load_plugins, parser_of, split_help, tell_missing
from engrax.errors import UserError
from engrax.flags import filled, override, positive

EXAMPLE = "engrax compare titans_ablation --folder runs/titans_ablation --steps 300"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "compare",
        EXAMPLE,
        "Trains and tabulates a comparison: every experiment at every learning rate of the grid, the best rate with "
        "several seeds. Continues after an interruption. Any field of all experiments is a flag: --steps 300. With run "
        "folders (engrax compare RUN RUN ...) it compares finished runs as they are.",
    )
    parser.add_argument(
        "config", type=filled, help="a comparison that `engrax list` shows, a .py file with comparison(), or a run"
    )
    parser.add_argument("--folder", type=filled, help="where its runs and tables go (default: runs/COMPARISON)")
    parser.add_argument(
        "--seeds", type=positive, help="at the best learning rate (default: the comparison's); 1 = a look, no verdicts"
    )
    add_running(parser)
    known, rest = split_help(parser, args, EXAMPLE)
    from engrax import configs, evals
    from engrax.train import runs

    load_plugins(known.plugin)
    command = shlex.join(["engrax", "compare", *args])
    if (runs.folder(known.config) / "config.json").exists():
        if wrong := [arg for arg in rest if arg.startswith("-")]:
            raise UserError(f"finished runs are compared as they are: {wrong[0]} cannot change them.")
        found = evals.compare_runs([known.config, *rest], known.folder, command=command)
    else:
        comparison, name = configs.find_comparison(known.config)
        prog = f"engrax compare {known.config}"
        experiments = {label: override(e, rest, prog) for label, e in comparison.experiments.items()}
        seeds = comparison.seeds if known.seeds is None else known.seeds
        comparison = dataclasses.replace(comparison, experiments=experiments, seeds=seeds)
        options = dict(processes=known.processes, minutes=known.minutes, command=command)
        found = evals.compare(comparison, known.folder or f"runs/{name}", **options)
    print(found.markdown)
    if found.directory is not None:
        print(f"The table, its numbers and its plot are in {found.directory}")
    return tell_missing(found.missing)
