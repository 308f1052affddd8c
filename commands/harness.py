"""`engrax harness`: lm-evaluation-harness on a run, or on a published checkpoint."""

import json
import sys

from engrax.commands.common import parser_of
from engrax.errors import UserError
from engrax.flags import filled

EXAMPLE = "engrax harness runs/a --tasks my_task --include_path tasks --batch_size 8"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "harness",
        EXAMPLE,
        "Runs lm-evaluation-harness (pip install 'engrax[harness]') on a run or on a published checkpoint. All other "
        "flags are those of `lm-eval run`.",
    )
    parser.add_argument("run", type=filled, help="a run folder, or the folder of a published checkpoint")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers mixers of your own")
    known, rest = parser.parse_known_args(args)
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        raise UserError("lm-evaluation-harness is not installed; run pip install 'engrax[harness]'.") from None
    from engrax.evals import harness  # noqa: F401, registers the model's name

    model = {"run": known.run, "step": known.step, "plugins": known.plugin}
    sys.argv = ["lm-eval", "run", "--model", "engrax", "--model_args", json.dumps(model), *rest]  # its only input
    cli_evaluate()
    return 0
