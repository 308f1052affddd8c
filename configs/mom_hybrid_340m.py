"""Mixture of memories with sliding-window attention in every fourth layer; else as `mom_340m`.

    engrax train mom_hybrid_340m --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/mom_hybrid_340m

456 M parameters. Any mixer may stand in the pattern; not trained by us, so no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import AttentionConfig, GatedDeltaNetConfig, MoMConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    memory = GatedDeltaNetConfig(heads=8, head_dim=128, value_dim=128, chunk_size=64)
    mom = MoMConfig(base=memory, memories=4, top_k=2, shared=True, balance_weight=0.01)
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=32_000,
            dim=1024,
            mixers=(mom, mom, mom, AttentionConfig(heads=16, head_dim=64, window=1024)),
            repeat=6,
            mlp_hidden=2048,
            remat="dots",
        ),
        data=TextFolder(path="corpus", seq_len=2048),
        steps=28_600,
        batch_size=256,
        optimizer=AdamWConfig(learning_rate=3e-4, weight_decay=0.01, schedule=CosineConfig(warmup_steps=1024)),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
