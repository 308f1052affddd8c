"""MQAR with the Titans memory alone: 64 tokens, 4 pairs, vocabulary 128.

    engrax train mqar_titans --run-dir runs/mqar_titans

Two CPU cores, 67 s, seed 0: 95.6 % of the labelled tokens right at step 300, 99.5 % at step 800.
Chance is 1.6 %; a model that knows which tokens are values reaches 25 %. Measured 2026-11-21, jax 0.12.0.1.
"""

from engrax.data import MQAR
from engrax.layers import TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=128,
            dim=64,
            # Random keys seldom repeat within a chunk, so writes may be larger than the default bound allows.
            mixers=(TitansConfig(heads=1, head_dim=64, hidden=64, chunk_size=16, max_lr=0.5),),
            repeat=1,
        ),
        data=MQAR(seq_len=64, num_pairs=4, vocab_size=128),
        steps=800,
        batch_size=32,
        optimizer=AdamWConfig(learning_rate=5e-3, weight_decay=0.01, schedule=CosineConfig(warmup_steps=50)),
        checkpoint=CheckpointConfig(every=400),
        eval=EvalConfig(every=100, batches=16),
    )
