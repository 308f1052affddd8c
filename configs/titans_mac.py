"""Titans MAC, the memory as context of the attention inside segments, on the quickstart's text.

    engrax train titans_mac --run-dir runs/titans_mac
    engrax evaluate runs/titans_mac --stream 16384

Sized for two CPU cores; not trained to the end by us yet, so no figure stands here.
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
