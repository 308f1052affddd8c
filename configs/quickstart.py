"""Quickstart: a small Titans language model on the source text of the running Python's standard library.

    engrax train quickstart --run-dir runs/quickstart

Two CPU cores, 3 to 5 minutes, seed 0: 2.03 bits per byte, where the order-3 n-gram counted on the same bytes has 2.25.
Measured 2026-11-30, Python 3.13 (the text differs between Pythons), jax 0.12.0.1.
"""

from engrax.data import StdlibText
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=256,
            dim=128,
            mixers=(
                AttentionConfig(heads=4, head_dim=32, window=32),
                TitansConfig(heads=4, head_dim=32, hidden=64, chunk_size=32),
            ),
            repeat=2,
        ),
        data=StdlibText(seq_len=256),
        steps=300,
        batch_size=16,
        optimizer=AdamWConfig(learning_rate=4e-3, schedule=CosineConfig(warmup_steps=50)),
        checkpoint=CheckpointConfig(every=150),
        eval=EvalConfig(every=50, batches=4),
        log=LogConfig(every=10),
    )
