"""`engrax evaluate`: evaluates a checkpoint."""

from engrax.commands.common import parser_of
from engrax.errors import UserError
from engrax.flags import fields_of, filled, positive, several, split_data, split_flags

EXAMPLE = """engrax evaluate runs/quickstart --step best --only validation,stream
  engrax evaluate runs/a runs/b --tasks niah_single_1 --lengths 1024,4096 --folder runs/a_and_b
  engrax evaluate runs/mqar --tasks mqar,forgetting_mqar --lengths 64,256 --task.num-updates 0,4"""


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "evaluate",
        EXAMPLE,
        "Evaluates a checkpoint. Writes results.json, CSV, plots and report.html into a new folder: RUN/evals/step_N, "
        "then step_N-2, step_N-3, ... With --tasks, --lengths, --pairs, --examples or --task.FIELD it evaluates on "
        "generated tasks instead. Several runs are evaluated one after another, and a page shows them side by side.",
    )
    parser.add_argument("run", type=filled, help="the run folder")
    parser.add_argument("others", type=filled, nargs="*", metavar="RUN", help="further runs, for one page of all")
    parser.add_argument("--folder", type=filled, help="where the page of several runs goes (default: beside the first)")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--only", metavar="NAMES", help="evaluators to run, with commas between (default: all)")
    parser.add_argument("--batches", type=positive, default=None, help="validation batches (default: 131,072 tokens)")
    parser.add_argument("--stream", type=positive, metavar="TOKENS", help="also read long validation documents so far")
    parser.add_argument(
        "--tasks", metavar="NAMES", help="generated tasks, with commas between (default: the run's own)"
    )
    parser.add_argument("--lengths", type=several(positive), metavar="N,N", help="tokens per row of the tasks")
    parser.add_argument("--pairs", type=several(positive), metavar="N,N", help="numbers of pairs of the tasks")
    parser.add_argument("--examples", type=positive, metavar="N", help="rows of each setting (default: 500)")
    parser.add_argument(
        "--plugin", action="append", default=[], help="a .py file that registers mixers or evaluators of your own"
    )
    given, args = split_flags(args, "--task.")
    known, data = split_data(parser, args)
    from engrax import evaluate

    only = None if known.only is None else [name.strip() for name in known.only.split(",") if name.strip()]
    settings = dict(step=known.step, only=only, batches=known.batches, stream=known.stream)
    tasks = dict(tasks=known.tasks, lengths=known.lengths, pairs=known.pairs, examples=known.examples)
    tasks["task"] = fields_of(given, "--task.")
    names = [known.run, *known.others]
    if len(names) == 1 and known.folder is not None:
        raise UserError("--folder is for the page of several runs; name a second one.")
    found = [evaluate(name, **settings, **tasks, plugins=known.plugin, data=data) for name in names]
    if len(found) == 1:
        print(found[0].summary())
    else:
        from engrax.evals.side_by_side import side_by_side

        folder = known.folder or found[0].directory.parent.parent.parent / "side_by_side"
        print(side_by_side(found, folder).summary())
    return 0
