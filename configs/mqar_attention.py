"""MQAR with softmax attention alone: 64 tokens, 4 pairs, vocabulary 128.

    engrax train mqar_attention --run-dir runs/mqar_attention

Two CPU cores, 36 s, seed 0: 95.7 % of the labelled tokens right at step 200, 99.8 % at step 800.
Chance is 1.6 %; a model that knows which tokens are values reaches 25 %. Measured 2026-11-21, jax 0.12.0.1.
"""

from engrax.data import MQAR
from engrax.layers import AttentionConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=128,
            dim=64,
            mixers=(AttentionConfig(heads=1, head_dim=64, conv_width=4),),
            repeat=1,
        ),
        data=MQAR(seq_len=64, num_pairs=4, vocab_size=128),
        steps=800,
        batch_size=32,
        optimizer=AdamWConfig(learning_rate=5e-3, weight_decay=0.01, schedule=CosineConfig(warmup_steps=50)),
        checkpoint=CheckpointConfig(every=400),
        eval=EvalConfig(every=100, batches=16),
    )
