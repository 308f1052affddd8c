"""Based recalls more than a window of attention at equal bytes of state, and less than attention over everything.

    engrax reproduce based_frontier --preset full
    engrax frontier mqar --mixers based,attention          # the same cells as a plot

Cells are those of `engrax frontier` (docs/frontier.md), two mixers at three sizes.
"""

from engrax.configs.claims.forgetting_recall import RULE
from engrax.evals import Claim, Comparison, claims, frontier


def comparison() -> Comparison:
    """The comparison; the first is Based at its smallest."""
    cells, _ = frontier.cells(frontier.setting("mqar", ("based", "attention")))
    names = {cell: f"{'window' if cell.mixer == 'attention' else cell.mixer}, {cell.size}" for cell in cells}
    names = {cell: "attention, whole row" if cell.size == "whole row" else name for cell, name in names.items()}
    experiments = {names[cell]: cell.experiment for cell in cells}
    pairs = [(f"based, {size}", f"window, {size}") for size in dict.fromkeys(cell.size for cell in cells)]
    source = "arXiv 2402.18668, figure 2"
    found = [Claim(*pair, source) for pair in pairs if experiments.keys() >= set(pair)]
    largest = max((cell for cell in cells if cell.mixer == "based"), key=lambda cell: cell.state_bytes)
    found.append(Claim("attention, whole row", names[largest], source))
    return Comparison(experiments=experiments, learning_rates=(3e-3, 1e-2, 3e-2), claims=tuple(found))


def card() -> claims.Card:
    """The claims; the quick preset trains the smallest pair for 60 steps."""
    every = comparison()
    pair = (every.claims[0].better, every.claims[0].worse)
    return claims.Card(
        paper="arXiv 2402.18668, figure 2: along the trade-off of recall and state, Based recalls more than a sliding "
        "window and than Mamba at equal state; attention over all tokens recalls everything.",
        here="MQAR with 64 tokens and 12 pairs, two layers of width 32 without MLPs, a short convolution for all, "
        "states of 1, 4 and 16 KiB a layer, 1,000 steps of 32 rows (quick: 60 steps, the smallest pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(every, pair, steps=60)),
        full=claims.Compared(every),
    )
