"""Recall among noise: noisy in-context recall of MAD (arXiv 2403.17844), 64 tokens, 6 of 10 pairs are noise.

    engrax compare noisy_recall

Two layers of width 32 without MLPs, the same short convolution for all and equal states, with and without a gate on the
memory: does forgetting on demand keep the noise out? docs/task_verdicts.md has the table.
"""

from engrax.configs.comparisons.forgetting_recall import STATE, experiment
from engrax.data import NoisyInContextRecall
from engrax.evals import Claim, Comparison
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
