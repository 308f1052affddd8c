"""Titans on the One Billion Word benchmark through TFDS, prepared beforehand as ArrayRecord.

    python -c "import tensorflow_datasets as t; t.builder('lm1b', file_format='array_record').download_and_prepare()"
    engrax train lm1b_titans --run-dir runs/lm1b_titans

34 M parameters, sized for one accelerator; not trained by us yet, so no figure stands here.
"""

from engrax.data import TfdsText
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=256,
            dim=512,
            mixers=(
                AttentionConfig(heads=8, head_dim=64, window=256),
                TitansConfig(heads=8, head_dim=64, hidden=128, chunk_size=64, persistent_tokens=4),
            ),
            repeat=5,
            remat="dots",
        ),
        data=TfdsText(name="lm1b", train_split="train", validation_split="test", seq_len=1024),
        steps=20_000,
        batch_size=64,
        align=64,
        optimizer=AdamWConfig(learning_rate=1e-3, schedule=CosineConfig(warmup_steps=500)),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
