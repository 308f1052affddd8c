"""Every part of the Titans memory helps, tried on recall in place of the paper's text.

    engrax reproduce titans_ablation_mqar --preset full
    engrax compare titans_ablation_mqar --steps 1200          # with other settings

MQAR with 64 tokens and 16 pairs.

Six variants of the memory, two layers of width 64 without MLPs, at three learning rates, the best with three seeds; a
run takes half a minute of one core. A linear memory holds these 16 pairs already, and the whole memory finds them all:
deeper ones, and memory beside attention, could not show that they are better. docs/titans.md has the table.
"""

import dataclasses

from engrax.configs.claims import titans_ablation
from engrax.configs.claims.forgetting_recall import RULE
from engrax.data import MQAR
from engrax.evals import Comparison, claims
from engrax.layers import TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CosineConfig, EvalConfig, Experiment


def experiment(mixer) -> Experiment:
    """The experiment with this mixer in both layers."""
    return dataclasses.replace(
        titans_ablation.experiment(mixer),
        model=LanguageModelConfig(vocab_size=64, dim=64, mixers=(mixer,), repeat=2, mlp_hidden=0),
        data=MQAR(seq_len=64, num_pairs=16, vocab_size=64),
        steps=600,
        batch_size=16,
        optimizer=AdamWConfig(weight_decay=0.01, schedule=CosineConfig(warmup_steps=100)),
        eval=EvalConfig(every=50, batches=4),
    )


def comparison() -> Comparison:
    """The comparison: the memory alone first. What the paper claims, it claims of text."""
    memory = TitansConfig(heads=1, head_dim=64, hidden=64, chunk_size=16, max_lr=0.5, persistent_tokens=4)
    every = titans_ablation.comparison(experiment, memory, learning_rates=(3e-3, 1e-2, 3e-2))
    left_out = ("MAC", "MAG", "MAL", "depth 3")
    kept = {name: variant for name, variant in every.experiments.items() if name not in left_out}
    return dataclasses.replace(every, experiments=kept, claims=tuple(c for c in every.claims if c.better in kept))


def card() -> claims.Card:
    """The claims; the quick preset trains one pair for 60 steps."""
    return claims.Card(
        paper="arXiv 2501.00663, table 5, perplexity: the memory alone (LMM) 27.01, linear 28.49, without convolution "
        "28.73, momentum 28.98, forgetting 29.04, persistent tokens 27.63.",
        here="MQAR with 64 tokens and 16 pairs; two layers of width 64 without MLPs, one head 64 -> 64 -> 64, chunks "
        "of 16 tokens, 600 steps of 16 rows (quick: 60 steps, one pair). The paper claims this of text, not of recall.",
        rule=RULE,
        quick=claims.Compared(claims.part(comparison(), ("LMM", "no convolution"), steps=60)),
        full=claims.Compared(comparison()),
    )
