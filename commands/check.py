"""`engrax check`: runs the laws on mixers and models."""

from engrax.commands.common import parser_of
from engrax.flags import filled

EXAMPLE = "engrax check my_mixer.py --law causality"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of(
        "check",
        EXAMPLE,
        "Runs the laws (causality, state carry, packing, ...) on mixers and models. Ends with 0 where all hold, with 1 "
        "and a line for each broken law otherwise.",
    )
    parser.add_argument(
        "target", type=filled, help="a .py file, all of whose mixers and models are checked, or a registered name"
    )
    parser.add_argument("--law", action="append", default=[], help="a law, or a part of one; several times for several")
    known = parser.parse_args(args)
    from engrax import check

    breaches = check(known.target, laws=known.law)
    for breach in breaches:
        print(f"{breach.subject}: {breach}")
    if not breaches:
        print(f"{known.target}: all laws hold")
    return 1 if breaches else 0
