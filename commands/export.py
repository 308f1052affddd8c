"""`engrax export`: writes a run as a published checkpoint."""

import sys

from engrax.commands.common import parser_of
from engrax.flags import filled

EXAMPLE = "engrax export runs/hybrid published --to qwen3_5_text"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "export",
        EXAMPLE,
        "Writes a run as a published checkpoint: weights (safetensors), config.json, tokenizer and model card, as "
        "transformers or flash-linear-attention load it. `engrax describe RUN` says which formats fit. Without --to a "
        "run that began from a published checkpoint is written back in its own files and names.",
    )
    parser.add_argument("run", type=filled, help="the run folder")
    parser.add_argument("folder", type=filled, help="where the files go; must be empty or new")
    parser.add_argument("--to", metavar="FORMAT", help="qwen3_5_text, gated_deltanet, llama, ...; safetensors fits all")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--dtype", default="float32", help="with --to: float32 (default), bfloat16 or float16")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers the run's own mixers")
    known = parser.parse_args(args)
    from engrax import export

    options = dict(to=known.to, step=known.step, dtype=known.dtype, plugins=known.plugin)
    for note in export(known.run, known.folder, **options):
        print(f"note: {note}", file=sys.stderr)
    print(f"exported to {known.folder}")
    return 0
