"""Titans MAC, the memory as context of the attention inside segments, on the quickstart's text.

    engrax train titans_mac --carry-memory --run-dir runs/titans_mac
    engrax evaluate runs/titans_mac --stream 16384

Two CPU cores, seed 0, half of the text held out: 2.73 bits per byte on rows of 256, 2.31 in the last quarter of 16,384
bytes (docs/titans.md). Measured 2026-11-30, Python 3.13, jax 0.12.0.1, on the split of commit
a472221, which chose validation documents by length.
"""

import dataclasses

from engrax.configs import quickstart
from engrax.layers import MACConfig, TitansConfig
from engrax.models import TitansMACConfig
from engrax.train import Experiment


def config() -> Experiment:
    """The experiment."""
    memory = TitansConfig(heads=4, head_dim=32, hidden=64, chunk_size=32)
    mixer = MACConfig(memory=memory, chunk_size=64)
    return dataclasses.replace(
        quickstart.config(), model=TitansMACConfig(vocab_size=256, dim=128, mixers=(mixer,), repeat=2)
    )
