"""Gated DeltaNet at 1.3B (arXiv 2412.06464): layers of 6 d^2 parameters as published, MLPs of 8 d^2.

    engrax train gated_deltanet_1b3 --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/gdn_1b3

1302 M parameters. Sized for 8 GPUs of 16 rows and 100 B tokens; not trained by us, so no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import GatedDeltaNetConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, ParallelConfig


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=32_000,
            dim=2048,
            mixers=(GatedDeltaNetConfig(heads=12, head_dim=128, value_dim=256, chunk_size=64),),
            repeat=21,
            remat="dots",
        ),
        data=TextFolder(path="corpus", seq_len=4096),
        steps=190_700,
        batch_size=128,
        optimizer=AdamWConfig(learning_rate=4e-4, weight_decay=0.1, schedule=CosineConfig(warmup_steps=1900)),
        parallel=ParallelConfig(fsdp=8, zero=3),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
