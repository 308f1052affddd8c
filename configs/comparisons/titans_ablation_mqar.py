"""The variants of the Titans ablation on recall: MQAR with 64 tokens and 8 pairs, in place of the paper's text.

    engrax compare titans_ablation_mqar

Eleven variants of two layers of width 64, at three learning rates, the best with three seeds. Not run to the end by
us yet, so no figure stands here.
"""

import dataclasses

from engrax.configs.comparisons import titans_ablation
from engrax.data import MQAR
from engrax.evals import Comparison
from engrax.models import LanguageModelConfig
from engrax.train import Experiment, OptimizerConfig


def experiment(mixer) -> Experiment:
    """The experiment with this mixer in every layer."""
    return dataclasses.replace(
        titans_ablation.experiment(mixer),
        model=LanguageModelConfig(vocab_size=128, dim=64, mixers=(mixer,), repeat=2),
        data=MQAR(seq_len=64, num_pairs=8, vocab_size=128),
        steps=400,
        batch_size=32,
        optimizer=OptimizerConfig(warmup_steps=50, weight_decay=0.01),
    )


def comparison() -> Comparison:
    """The comparison: the memory alone first. What the paper claims, it claims of text."""
    return titans_ablation.comparison(experiment)
