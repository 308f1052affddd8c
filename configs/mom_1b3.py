"""Mixture of memories at the size that its paper calls 1.3B (arXiv 2502.13685): 4 memories, top-2, a shared one.

    engrax train mom_1b3 --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/mom_1b3

1620 M parameters. 8 heads of 128 stand where the released settings have 4 of 256: as many parameters, half the state,
and a width that kernels serve on every accelerator. Sized for 8 GPUs of 32 rows and 100 B tokens; not trained by us, so
no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import GatedDeltaNetConfig, MoMConfig
from engrax.models import LanguageModelConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, ParallelConfig


def config() -> Experiment:
    """The experiment."""
    memory = GatedDeltaNetConfig(heads=8, head_dim=128, value_dim=128, chunk_size=64)
    return Experiment(
        model=LanguageModelConfig(
            vocab_size=32_000,
            dim=2048,
            mixers=(MoMConfig(base=memory, memories=4, top_k=2, shared=True, balance_weight=0.01),),
            repeat=24,
            mlp_hidden=5632,
            remat="dots",
            layout=BlockStyleConfig(tied=False),
        ),
        data=TextFolder(path="corpus", seq_len=2048),
        steps=190_700,
        batch_size=256,
        optimizer=AdamWConfig(learning_rate=3e-4, weight_decay=0.01, schedule=CosineConfig(warmup_steps=1024)),
        parallel=ParallelConfig(fsdp=8, zero=3),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
