"""Titans LMM, the memory alone, on the quickstart's text: no attention, a state of fixed size.

    engrax train titans_lmm --run-dir runs/titans_lmm
    engrax evaluate runs/titans_lmm --stream 16384

Sized for two CPU cores; not trained to the end by us yet, so no figure stands here.
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
