"""Parity of strings of 2 to 40 bits: which memories can keep a state that every token may flip?

    engrax compare parity

Two layers of width 32 without MLPs, the same short convolution for all and equal states. With beta up to 2 the state's
transition has eigenvalues down to -1, which parity needs; with beta up to 1, and for decays, they lie in [0, 1]
(arXiv 2411.12537). The score is the accuracy per position. docs/task_verdicts.md has the table, and the accuracies of
whole strings beyond the lengths of the training.
"""

from engrax.configs.comparisons import forgetting_recall
from engrax.configs.comparisons.forgetting_recall import experiment
from engrax.data import Parity
from engrax.evals import Claim, Comparison
from engrax.layers import MIXERS

STATE = forgetting_recall.STATE | dict(chunk_size=16)


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
