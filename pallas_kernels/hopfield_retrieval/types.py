"""Types for a call of Hopfield retrieval: static settings, inputs, shapes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from engrax.pallas_kernels.common.matmul import Operands


class Reach(NamedTuple):
    """How far a state sees from its place (`visibility`). window: in patterns, its place included; None: any age."""

    causal: bool = False
    window: int | None = None


class Sight(NamedTuple):
    """What beside the reach decides which patterns the states see: a dense mask or segment ids, or neither.

    mask: with a middle axis of N or 1. segments: of the states. stored_segments: of the patterns; None, as given by a
    caller: those of the states. place: of the states among the patterns, where the reach has limits (`resolve`).
    """

    mask: Bool[Array, "B _ M"] | None = None
    segments: Int[Array, "B N"] | None = None
    stored_segments: Int[Array, "B M"] | None = None
    place: Int[Array, " N"] | None = None


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
    reach: Reach = Reach()
    scores: int | None = None
    interpret: bool = False


class RetrievalInputs(NamedTuple):
    """The inputs of every implementation of retrieval; the sight is resolved."""

    state: Float[Array, "B H N D"]
    stored: Float[Array, "B H M D"]
    values: Float[Array, "B H M V"]
    beta: Float[Array, " H"]
    sight: Sight


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
    causal: bool = False
    window: int | None = None
    segments: bool = False
    mask_per_state: bool = False
