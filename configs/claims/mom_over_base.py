"""A mixture of memories recalls more than one memory: at the paper's sizes, and at equal state.

    engrax reproduce mom_over_base --preset full
    engrax compare mom_over_base --steps 1600          # with other settings

The paper gives every memory of the mixture the size of the one memory it is compared with. The same claim is tried with
mixtures whose memories hold as much together as the one.
"""

from engrax.configs.claims.forgetting_recall import RULE
from engrax.configs.claims.mqar_mixers import CONV, experiment
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS


def comparison() -> Comparison:
    """The comparison; the first is the one memory."""

    def base(width):
        return MIXERS["gla"](heads=2, head_dim=width, value_dim=width, **CONV)

    source = "arXiv 2502.13685, tables 1 and 2: above its base on recall"
    return Comparison(
        experiments={
            "gla": experiment(base(16)),  # 2 x 16 x 16 = 512 numbers
            "mom, each as gla": experiment(MIXERS["mom"](base=base(16))),  # 4 memories and the shared one, 2560 numbers
            "mom, all as gla": experiment(MIXERS["mom"](base=base(7))),  # 490 numbers
        },
        learning_rates=(3e-3, 1e-2, 3e-2),
        claims=(Claim("mom, each as gla", "gla", source), Claim("mom, all as gla", "gla", source + "; equal state")),
    )


def card() -> claims.Card:
    """The claims; the quick preset trains a pair for 30 steps."""
    return claims.Card(
        paper="arXiv 2502.13685, table 2: on six recall tasks the gated delta rule scores 24.78 at 380 M parameters "
        "and the mixture of four such memories 28.16; 32.30 and 36.04 at 1.3 B.",
        here="MQAR with 128 tokens and 16 pairs, two layers of width 64 without MLPs, 800 steps of 16 rows. One "
        "memory of GLA with 2 x 16 x 16 numbers against four and a shared one, each of this size (the paper's "
        "convention) or together of this size (quick: 30 steps, the first pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), ("gla", "mom, each as gla"), steps=30)),
        full=claims.Compared(comparison()),
    )
