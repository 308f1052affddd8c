"""`engrax export`: writes a run as a published checkpoint."""

from engrax.commands.common import parser_of
from engrax.flags import filled

EXAMPLE = "engrax export runs/tuned exported --step best"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "export", EXAMPLE, "Writes a run that began from a published checkpoint back as one (safetensors)."
    )
    parser.add_argument("run", type=filled, help="the run folder, trained with --init-from")
    parser.add_argument("folder", type=filled, help="where the files go; must be empty or new")
    parser.add_argument("--step", default=None, help="a step's number, or best (default: the newest)")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers the run's own mixers")
    known = parser.parse_args(args)
    from engrax import export

    export(known.run, known.folder, step=known.step, plugins=known.plugin)
    print(f"exported to {known.folder}")
    return 0
