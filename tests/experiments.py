"""Tiny experiments that several tests train."""

import dataclasses

from engrax.data import MQAR
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig

TITANS = TitansConfig(heads=2, head_dim=4, hidden=8, chunk_size=8)


def tiny(**fields) -> Experiment:
    """A Titans model of width 16 on MQAR that trains a step in a few milliseconds; every step is logged."""
    experiment = Experiment(
        model=LanguageModelConfig(
            vocab_size=32,
            dim=16,
            mixers=(AttentionConfig(heads=2, head_dim=4, window=8), TITANS),
            repeat=2,
            mlp_hidden=16,
        ),
        data=MQAR(seq_len=24, num_pairs=2, vocab_size=32, train_examples=512, validation_examples=64),
        steps=8,
        batch_size=8,
        compute_dtype="float32",
        optimizer=AdamWConfig(learning_rate=1e-2, schedule=CosineConfig(warmup_steps=2)),
        checkpoint=CheckpointConfig(every=4),
        eval=EvalConfig(every=0, batches=2),
        log=LogConfig(every=1),
    )
    return dataclasses.replace(experiment, **fields)


def small(**fields) -> Experiment:
    """One block with a matrix memory: it compiles for 8 devices in seconds."""
    model = LanguageModelConfig(
        vocab_size=32, dim=16, mixers=(dataclasses.replace(TITANS, depth=1),), repeat=1, mlp_hidden=16
    )
    return tiny(model=model, batch_size=16, **fields)
