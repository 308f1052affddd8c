"""`engrax reproduce`: tries the claims of papers at a small size."""

import shlex

from engrax.commands.common import add_running, load_plugins, parser_of, tell_missing
from engrax.flags import filled

EXAMPLE = "engrax reproduce hopfield_theory --preset quick"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code: 1 if a training is missing."""
    parser = parser_of(
        "reproduce",
        EXAMPLE,
        "Tries what a paper claims: runs a card's experiment, judges it by the card's rule and writes a page. "
        "Continues after an interruption. Without a card it lists them with what was found.",
    )
    parser.add_argument("card", type=filled, nargs="?", help="a listed name, or a .py file with card()")
    parser.add_argument("--preset", default="quick", help="quick (2 minutes of two cores) or full (default: quick)")
    parser.add_argument(
        "--folder", type=filled, default="runs/claims", help="of all cards' runs (default: runs/claims)"
    )
    parser.add_argument("--docs", type=filled, help="another folder for the page, its plots and its numbers")
    add_running(parser)
    known = parser.parse_args(args)
    from engrax import configs
    from engrax.evals import claim_report
    from engrax.evals.claims import Options

    load_plugins(known.plugin)
    if known.card is None:
        for name in configs.card_names():
            states = (f"{preset}: {claim_report.state(known.folder, name, preset)}" for preset in claim_report.PRESETS)
            print(f"{name:24} {configs.summary(name)}\n{'':24} {'; '.join(states)}")
        return 0
    card, name, title = configs.find_card(known.card)
    options = Options(known.processes, known.minutes, command=shlex.join(["engrax", "reproduce", *args]))
    found = claim_report.reproduce(
        card, name, title, known.folder, preset=known.preset, options=options, docs=known.docs
    )
    print(found.markdown)
    print(f"The page, its numbers and its plots are in {found.directory}")
    return tell_missing(dict(found.found.missing))
