"""Noisy in-context recall of MAD (arXiv 2403.17844): in-context recall with noise tokens between the pairs."""

import dataclasses

from engrax.data.config import DATASETS
from engrax.data.in_context_recall import InContextRecall


@DATASETS.register("noisy_in_context_recall")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyInContextRecall(InContextRecall):
    """MAD's noisy in-context recall: in-context recall with noise tokens between the pairs."""

    vocab_size: int = 32  # tokens: keys, values and noise
    noise_vocab: int = 16  # tokens that are noise
    noise: float = 0.2  # probability that a pair is noise
