"""Parity needs a state that a token can flip: negative eigenvalues.

    engrax reproduce parity --preset full
    engrax compare parity --steps 1000          # with other settings

Two layers of width 32 without MLPs, the same short convolution for all and equal states. With beta up to 2 the state's
transition has eigenvalues down to -1, which parity needs; with beta up to 1, and for decays, they lie in [0, 1]
(arXiv 2411.12537). The score is the accuracy per position. docs/task_verdicts.md has a full run.
"""

from engrax.configs.claims import forgetting_recall
from engrax.configs.claims.forgetting_recall import RULE, experiment
from engrax.data import Parity
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS

STATE = forgetting_recall.STATE | dict(chunk_size=16)
LENGTHS = {"2 to 40": {}} | {f"{a} to {b}": {"seq_len": b, "shortest": a} for a, b in ((41, 80), (81, 160))}


def comparison() -> Comparison:
    """The comparison; the first has no negative eigenvalues."""
    data = Parity(seq_len=40)
    mixers = {
        "deltanet": MIXERS["deltanet"](**STATE),
        "deltanet, beta to 2": MIXERS["deltanet"](**STATE, max_beta=2.0),
        "gated_deltanet": MIXERS["gated_deltanet"](**STATE),
        "gated_deltanet, beta to 2": MIXERS["gated_deltanet"](**STATE, max_beta=2.0),
        "mamba2": MIXERS["mamba2"](**STATE | dict(heads=1, value_heads=2)),
    }
    source = "arXiv 2411.12537: parity needs negative eigenvalues"
    return Comparison(
        experiments={name: experiment(mixer, data, steps=500, batch_size=32) for name, mixer in mixers.items()},
        learning_rates=(3e-3, 1e-2, 3e-2),
        claims=(
            Claim("deltanet, beta to 2", "deltanet", source),
            Claim("gated_deltanet, beta to 2", "gated_deltanet", source),
            Claim("deltanet, beta to 2", "mamba2", source),
        ),
    )


def by_length(directory) -> dict[str, float]:
    """The share of strings that a run solves at every position, at the training's lengths and beyond."""
    shares = {}
    for name, fields in LENGTHS.items():
        rows, right, _ = claims.answers(directory, fields)
        strings = rows.labelled.any(axis=1)  # the last batch is filled with empty rows
        shares[name] = float((right == rows.labelled).all(axis=1)[strings].mean())
    return shares


def card() -> claims.Card:
    """The claim; the quick preset trains two for 100 steps."""
    title = "Share of strings right at every position, by their bits:"
    pair = ("gated_deltanet", "gated_deltanet, beta to 2")
    return claims.Card(
        paper="arXiv 2411.12537 proves that a linear recurrence whose transitions have no negative eigenvalue cannot "
        "compute parity at every length; beta up to 2 gives a delta rule eigenvalues down to -1.",
        here="Strings of 2 to 40 bits, two layers of width 32 without MLPs, states of 2 x 16 x 16 numbers a layer, 500 "
        "steps of 32 strings (quick: 100 steps, one pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), pair, steps=100), by_length, title),
        full=claims.Compared(comparison(), by_length, title),
    )
