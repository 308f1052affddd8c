"""Copying tokens from among blanks needs gates that depend on the token.

    engrax reproduce selective_copy --preset full
    engrax compare selective_copy --steps 1600          # with other settings

Two layers of width 32 without MLPs, the same short convolution for all and equal states. Linear attention and RetNet
forget nothing or at a fixed rate; GLA and Mamba-2 choose by the token. Keys depend on the token in all of them: engrax
has no layer that is time-invariant altogether, as S4 is. docs/task_verdicts.md has a full run.
"""

from engrax.configs.claims.forgetting_recall import RULE, STATE, experiment
from engrax.data import SelectiveCopying
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS


def comparison() -> Comparison:
    """The comparison; the first forgets at a fixed rate."""
    data = SelectiveCopying(seq_len=64, num_tokens=8)
    mixers = {name: MIXERS[name](**STATE) for name in ("retnet", "linear_attention", "gla")}
    mixers["mamba2"] = MIXERS["mamba2"](**STATE | dict(heads=1, value_heads=2))
    source = "arXiv 2312.00752: selection copies what a time-invariant rule cannot"
    return Comparison(
        experiments={name: experiment(mixer, data, 800) for name, mixer in mixers.items()},
        learning_rates=(3e-3, 1e-2, 3e-2),
        claims=(Claim("mamba2", "retnet", source), Claim("gla", "retnet", source)),
    )


def card() -> claims.Card:
    """The claim; the quick preset trains two for 60 steps."""
    return claims.Card(
        paper="arXiv 2312.00752: selective copying needs a state whose decay depends on the token; a time-invariant "
        "one fails.",
        here="Selective copying in MAD's form (arXiv 2403.17844), 8 tokens among blanks in 64; two layers of width 32 "
        "without MLPs, equal states, 800 steps of 16 rows (quick: 60 steps, one pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), ("retnet", "gla"), steps=60)),
        full=claims.Compared(comparison()),
    )
