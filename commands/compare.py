"""`engrax compare`: trains and tabulates a comparison."""

import dataclasses
import shlex

from engrax.commands.common import parser_of, split_help
from engrax.flags import filled, override, positive

EXAMPLE = "engrax compare titans_ablation --folder runs/titans_ablation --steps 300"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "compare",
        EXAMPLE,
        "Trains and tabulates a comparison: every experiment at every learning rate of the grid, the best rate with "
        "several seeds. Continues after an interruption. Any field of all experiments is a flag: --steps 300.",
    )
    parser.add_argument(
        "config", type=filled, help="a comparison that `engrax list` shows, or a .py file with comparison()"
    )
    parser.add_argument("--folder", type=filled, help="where its runs and tables go (default: runs/COMPARISON)")
    parser.add_argument("--seeds", type=positive, help="at the best learning rate (default: the comparison's)")
    known, rest = split_help(parser, args, EXAMPLE)
    from engrax import configs, evals

    comparison, name = configs.find_comparison(known.config)
    prog = f"engrax compare {known.config}"
    experiments = {label: override(e, rest, prog) for label, e in comparison.experiments.items()}
    seeds = comparison.seeds if known.seeds is None else known.seeds
    comparison = dataclasses.replace(comparison, experiments=experiments, seeds=seeds)
    found = evals.compare(comparison, known.folder or f"runs/{name}", command=shlex.join(["engrax", "compare", *args]))
    print(found.markdown)
    print(f"The table, its numbers and its plot are in {found.directory}")
    return 0
