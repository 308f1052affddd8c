"""Types of a call of Hopfield retrieval: static settings, inputs, shapes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float

from engrax.pallas_kernels.common.matmul import Operands


class RetrievalForm(NamedTuple):
    """steps: updates, None = until the state rests; at most `max_steps`. gradient: "unrolled" or "implicit".

    A state rests once an update moves it by no more than `tolerance` times the length of its longest visible pattern.
    operands: of the matrix products. scores: how many are worked on at once, None = all. interpret: kernels are
    interpreted.
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
    """The sizes of a call, by which a kernel decides whether it serves it."""

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
