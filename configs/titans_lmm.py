"""Titans LMM, the memory alone, on the quickstart's text: no attention, a state of fixed size.

    engrax train titans_lmm --run-dir runs/titans_lmm
    engrax train titans_lmm --carry-memory --run-dir runs/carried     # for documents longer than a row
    engrax evaluate runs/carried --stream 16384

Two CPU cores, seed 0: 2.10 bits per byte; read past 2,048 bytes it gets ever worse, with --carry-memory it does not
(docs/titans.md). Measured 2026-11-29 and -30, Python 3.13, jax 0.12.0.1, on the split of commit
a472221, which chose validation documents by length.
"""

import dataclasses

from engrax.configs import quickstart
from engrax.layers import TitansConfig
from engrax.models import TitansLMMConfig
from engrax.train import Experiment


def config() -> Experiment:
    """The experiment."""
    memory = TitansConfig(heads=4, head_dim=32, hidden=64, chunk_size=32, persistent_tokens=4)
    return dataclasses.replace(
        quickstart.config(), model=TitansLMMConfig(vocab_size=256, dim=128, mixers=(memory,), repeat=3)
    )
