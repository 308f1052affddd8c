"""HMT around a small backbone on long books: what segments far back are worth.

    engrax train hmt_books --data.path BOOKS --run-dir runs/hmt
    engrax evaluate runs/hmt --stream 16384           # loss by position in the document, state bytes, time per token

BOOKS is any folder of long texts (.txt, a file is a document). Rows hold 8 segments of 128 bytes; documents begin on
the segments' grid. `hmt_books_rmt` and `hmt_books_window` are the same backbone, tokens and steps with RMT's memory,
and with a sliding window as long as a segment and no memory. Sized for a CPU; benchmarks/hmt_books.py compares the
three, docs/hmt.md has what it found.
"""

from engrax.data import TextFolder
from engrax.layers import AttentionConfig
from engrax.models import HMTConfig, LanguageModelConfig, ModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment

SEGMENT, SEGMENTS = 128, 8


def backbone(window: int | None = None) -> LanguageModelConfig:
    """The language model that all three have."""
    attention = AttentionConfig(heads=4, head_dim=32, window=window)
    return LanguageModelConfig(vocab_size=256, dim=128, mixers=(attention,), repeat=2)


def experiment(model: ModelConfig) -> Experiment:
    """The experiment that all three have."""
    return Experiment(
        model=model,
        data=TextFolder(path="books", suffixes=(".txt",), seq_len=SEGMENT * SEGMENTS),
        steps=250,
        batch_size=4,
        align=SEGMENT,
        optimizer=AdamWConfig(learning_rate=2e-3, schedule=CosineConfig(warmup_steps=50)),
        checkpoint=CheckpointConfig(every=125),
        eval=EvalConfig(every=125, batches=8),
    )


def config() -> Experiment:
    """The experiment."""
    return experiment(
        HMTConfig(
            backbone=backbone(),
            segment_length=SEGMENT,
            summary_tokens=SEGMENT // 2,
            sensory_tokens=16,
            cache_size=64,
            recall_width=128,
            remat="full",
        )
    )
