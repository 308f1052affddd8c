"""Types for a call of Hopfield retrieval: static settings, inputs, shapes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from engrax.pallas_kernels.common.matmul import Operands


class RetrievalForm(NamedTuple):
    """steps: number of updates; None: until convergence, at most `max_steps`. gradient: "unrolled" or "implicit".

    A state has converged once an update moves it by at most `tolerance` times the norm of its longest visible pattern.
    operands: of the matrix products. scores: how many to process at once; None: all. interpret: interprets kernels.
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
    interpret: bool = False


class RetrievalInputs(NamedTuple):
    """The inputs of every implementation of retrieval; `visible` has a middle axis of N or 1."""

    state: Float[Array, "B H N D"]
    stored: Float[Array, "B H M D"]
    values: Float[Array, "B H M V"]
    beta: Float[Array, " H"]
    visible: Bool[Array, "B _ M"] | None


class RetrievalShapes(NamedTuple):
    """The sizes of a call, from which a kernel decides whether it can serve the call."""

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
