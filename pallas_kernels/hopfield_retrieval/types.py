"""What is static about a call of Hopfield retrieval."""

from typing import NamedTuple

import numpy as np

from engrax.pallas_kernels.common.matmul import Operands


class RetrievalForm(NamedTuple):
    """steps: updates, None = until the state rests; at most `max_steps`. gradient: "unrolled" or "implicit".

    A state rests once an update moves it by no more than `tolerance` times the length of its longest visible pattern.
    operands: of the matrix products. scores: how many are worked on at once, None = all.
    """

    steps: int | None
    tolerance: float
    max_steps: int
    separation: str
    alpha: float
    similarity: str
    gradient: str
    operands: Operands
    scores: int | None = None


class RetrievalShapes(NamedTuple):
    """What a kernel is asked to serve."""

    steps: int | None
    separation: str
    similarity: str
    batch: int
    heads: int
    states: int
    patterns: int
    key: int
    value: int
    dtype: np.dtype
    mask_per_state: bool
