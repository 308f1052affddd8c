"""`engrax merge`: adds a run's adapters to the kernels."""

from engrax.commands.common import parser_of
from engrax.flags import filled

EXAMPLE = "engrax merge runs/tuned runs/merged"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "merge", EXAMPLE, "Writes a run without its adapters (model.lora), each added to its kernel, as a run folder."
    )
    parser.add_argument("run", type=filled, help="the run folder, trained with --model.lora.rank")
    parser.add_argument("folder", type=filled, help="the run folder to write; must be empty or new")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers the run's own mixers")
    known = parser.parse_args(args)
    from engrax import plugins
    from engrax.train import merging, run_sources, runs

    for path in known.plugin:
        plugins.load(path)
    opened = runs.open_run(known.run)
    run_sources.warn_of_changes(opened.directory, known.plugin)
    print(f"merged step {merging.merge(opened, known.folder, known.step)} into {known.folder}")
    return 0
