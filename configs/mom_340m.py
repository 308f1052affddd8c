"""Mixture of memories at the size that its paper calls 340M (arXiv 2502.13685): 4 memories, top-2, a shared one.

    engrax train mom_340m --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/mom_340m

513 M parameters, of which a token uses 412 M: keys, values and gates of 5 memories stand where the Gated DeltaNet it is
compared with, of 310 M, has one. The released settings have 4 heads of 256; here are 8 heads of 128, of as many
parameters, since the GPU kernels take keys of up to 128 features. Sized for 32 GPUs of 8 rows and 15 B tokens; not
trained by us, so no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import GatedDeltaNetConfig, MoMConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment


def config() -> Experiment:
    """The experiment."""
    memory = GatedDeltaNetConfig(heads=8, head_dim=128, value_dim=128, chunk_size=64)
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=32_000,
            dim=1024,
            mixers=(MoMConfig(base=memory, memories=4, top_k=2, shared=True, balance_weight=0.01),),
            repeat=24,
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
