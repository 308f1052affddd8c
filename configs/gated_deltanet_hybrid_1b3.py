"""Gated DeltaNet with sliding-window attention in every fourth layer, heads and widths as in `gated_deltanet_1b3`.

    engrax train gated_deltanet_hybrid_1b3 --data.path CORPUS --data.tokenizer-file TOKENIZER.json --run-dir runs/hybrid

1201 M parameters: 20 layers. Any mixer may stand in the pattern; not trained by us, so no figure stands here.
"""

import dataclasses

from engrax.configs import gated_deltanet_1b3
from engrax.layers import AttentionConfig
from engrax.train import Experiment


def config() -> Experiment:
    """The experiment."""
    pure = gated_deltanet_1b3.config()
    (memory,), window = pure.model.mixers, AttentionConfig(heads=16, head_dim=128, window=2048)
    model = dataclasses.replace(pure.model, mixers=(memory, memory, memory, window), repeat=5)
    return dataclasses.replace(pure, model=model)
