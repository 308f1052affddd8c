"""Quickstart for one GPU or TPU: the quickstart's text and mixers, at sizes that the kernels serve.

    engrax describe quickstart_gpu --device h200     # what serves each operation
    engrax train quickstart_gpu --run-dir runs/quickstart_gpu

Heads of 64 features, chunks of 64 tokens, and documents that begin at a multiple of a chunk. Not trained on a GPU yet,
so no figure stands here.
"""

from engrax.data import StdlibText
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment

CHUNK = 64  # tokens


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=256,
            dim=512,
            mixers=(
                AttentionConfig(heads=8, head_dim=64, window=256),
                TitansConfig(heads=8, head_dim=64, hidden=64, chunk_size=CHUNK),
            ),
            repeat=4,
            remat="dots",
        ),
        data=StdlibText(seq_len=1024),
        steps=1000,
        batch_size=32,
        align=CHUNK,
        optimizer=AdamWConfig(learning_rate=1e-3, schedule=CosineConfig(warmup_steps=100)),
        checkpoint=CheckpointConfig(every=500),
        eval=EvalConfig(every=100, batches=8),
    )
