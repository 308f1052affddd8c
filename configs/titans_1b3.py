"""Titans LMM, the memory alone, at 1.3B (arXiv 2501.00663): a memory MLP of two layers in each of 32 heads.

    engrax train titans_1b3 --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/titans_1b3

1283 M parameters. The paper names no width of heads and memory; these are sizes that kernels serve on every
accelerator. Documents begin at multiples of the memory's chunk (`align`). Sized for 8 GPUs of 16 rows and 100 B tokens;
not trained by us, so no figure stands here.
"""

from engrax.data import TextFolder
from engrax.layers import TitansConfig
from engrax.models import TitansLMMConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, ParallelConfig


def config() -> Experiment:
    """The experiment."""
    return Experiment(
        model=TitansLMMConfig(
            vocab_size=32_000,
            dim=2048,
            mixers=(TitansConfig(heads=32, head_dim=64, hidden=128, depth=2, chunk_size=64),),
            repeat=22,
            remat="dots",
        ),
        data=TextFolder(path="corpus", seq_len=4096),
        steps=190_700,
        batch_size=128,
        align=64,
        optimizer=AdamWConfig(learning_rate=4e-4, weight_decay=0.1, schedule=CosineConfig(warmup_steps=1900)),
        parallel=ParallelConfig(fsdp=8, zero=3),
        checkpoint=CheckpointConfig(every=1000),
        eval=EvalConfig(every=1000, batches=20),
    )
