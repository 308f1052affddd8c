"""Gated DeltaNet at 340M (arXiv 2412.06464): layers of 6 d^2 parameters as published, MLPs of 8 d^2.

    engrax train gated_deltanet_340m --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/gdn_340m

342 M parameters. Sized for 32 GPUs of 8 rows and 15 B tokens; not trained by us, so no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import GatedDeltaNetConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=32_000,
            dim=1024,
            mixers=(GatedDeltaNetConfig(heads=6, head_dim=128, value_dim=256, chunk_size=64),),
            repeat=21,
            remat="dots",
        ),
        data=TextFolder(path="corpus", seq_len=2048),
        steps=28_600,
        batch_size=256,
        optimizer=AdamWConfig(learning_rate=3e-4, weight_decay=0.01, schedule=CosineConfig(warmup_steps=1024)),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
