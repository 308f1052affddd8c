"""The backbone alone on long books: the baseline of `hmt_books` that sees a sliding window as long as a segment.

    engrax train hmt_books_window --data.path BOOKS --run-dir runs/window

Backbone, data, tokens and steps are those of `hmt_books`.
"""

from engrax.configs.hmt_books import SEGMENT, backbone, experiment
from engrax.train import Experiment


def config() -> Experiment:
    """The experiment."""
    return experiment(backbone(window=SEGMENT))
