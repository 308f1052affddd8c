"""`engrax evaluate`: evaluates a checkpoint."""

from engrax.commands.common import parser_of
from engrax.flags import fields_of, filled, positive, several, split_data, split_flags

EXAMPLE = """engrax evaluate runs/quickstart --step best --only validation,stream
  engrax evaluate runs/mqar --tasks mqar,forgetting_mqar --lengths 64,256 --task.num-updates 0,4"""


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "evaluate",
        EXAMPLE,
        "Evaluates a checkpoint. Writes results.json, CSV, plots and report.html into a new folder: RUN/evals/step_N, "
        "then step_N-2, step_N-3, ... With --tasks, --lengths, --pairs, --examples or --task.FIELD it evaluates on "
        "generated tasks instead.",
    )
    parser.add_argument("run", type=filled, help="the run folder")
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
    print(evaluate(known.run, **settings, **tasks, plugins=known.plugin, data=data).summary())
    return 0
