"""`engrax sample`: copies the trained run that comes with engrax."""

from engrax.commands.common import parser_of
from engrax.flags import filled

EXAMPLE = "engrax sample runs/sample && engrax evaluate runs/sample --batches 2"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "sample",
        EXAMPLE,
        "Copies the trained run that comes with engrax into a folder: a small model of the standard library's source, "
        "to evaluate, to generate from and to continue.",
    )
    parser.add_argument("folder", type=filled, nargs="?", default="runs/sample", help="default: runs/sample")
    known = parser.parse_args(args)
    import engrax

    print(f"The run is in {engrax.sample(known.folder)}")
    return 0
