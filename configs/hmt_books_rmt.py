"""RMT on long books: the baseline of `hmt_books` whose memory is what the last segment left.

    engrax train hmt_books_rmt --data.path BOOKS --run-dir runs/rmt

Backbone, data, tokens and steps are those of `hmt_books`.
"""

from engrax.configs.hmt_books import SEGMENT, backbone, experiment
from engrax.models import RMTConfig
from engrax.train import Experiment


def config() -> Experiment:
    """The experiment."""
    return experiment(RMTConfig(backbone=backbone(), segment_length=SEGMENT, memory_tokens=8, remat="full"))
