"""A gated memory recalls more among noise than one without a gate.

    engrax reproduce noisy_recall --preset full
    engrax compare noisy_recall --steps 1600          # with other settings

Two layers of width 32 without MLPs, the same short convolution for all and equal states, with and without a gate on the
memory: does forgetting on demand keep the noise out? Noisy in-context recall is MAD's (arXiv 2403.17844).
"""

from engrax.configs.claims.forgetting_recall import RULE, STATE, experiment
from engrax.data import NoisyInContextRecall
from engrax.evals import Claim, Comparison, claims
from engrax.layers import MIXERS


def comparison() -> Comparison:
    """The comparison; the first has no gate."""
    data = NoisyInContextRecall(seq_len=64, vocab_size=48, noise=0.6)
    mixers = {name: MIXERS[name](**STATE) for name in ("linear_attention", "gla", "deltanet", "gated_deltanet")}
    source = "arXiv 2412.06464: gates filter what the memory should not keep"
    return Comparison(
        experiments={name: experiment(mixer, data, 800) for name, mixer in mixers.items()},
        learning_rates=(3e-3, 1e-2, 3e-2),
        claims=(Claim("gla", "linear_attention", source), Claim("gated_deltanet", "deltanet", source)),
    )


def card() -> claims.Card:
    """The claim; the quick preset trains the first pair for 60 steps."""
    return claims.Card(
        paper="arXiv 2412.06464: a gate filters what the memory should not keep, a delta rule alone does not. The "
        "task is MAD's noisy recall (arXiv 2403.17844).",
        here="Noisy in-context recall, 64 tokens, 6 of 10 pairs are noise; two layers of width 32 without MLPs, a "
        "short convolution for all, states of 2 x 16 x 16 numbers a layer, 800 steps of 16 rows (quick: 60 steps, one "
        "pair).",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), ("linear_attention", "gla"), steps=60)),
        full=claims.Compared(comparison()),
    )
