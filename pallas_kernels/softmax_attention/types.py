"""Types for a call of softmax attention: static settings, inputs, shapes."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int


class AttentionForm(NamedTuple):
    """Static settings. window: tokens a query sees, itself included; None: all before it.

    log_sum: whether the log of the softmax's sum is wanted. interpret: interprets kernels.
    """

    window: int | None
    scale: float
    log_sum: bool = False
    interpret: bool = False


class AttentionInputs(NamedTuple):
    """The inputs of every implementation, in one dtype."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T G K"]
    v: Float[Array, "B T G K"]
    segment_ids: Int[Array, "B T"] | None


Outputs = tuple[Array, ...]  # (out [B, T, H, K],), and with `log_sum` the log of the sum [B, T, H]


class AttentionShapes(NamedTuple):
    """The sizes of a call, from which an implementation decides whether it can serve the call."""

    batch: int
    length: int
    heads: int
    groups: int
    key: int
    window: int | None
    dtype: np.dtype
    segments: bool
    log_sum: bool
