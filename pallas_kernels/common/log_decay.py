"""Describes a call of the log-decay operations (`linear_attention`, `gated_delta_rule`) to implementations."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

LogDecayOutputs = tuple[Float[Array, "B T HV V"], Float[Array, "B *N HV K V"]]  # out in v's dtype, final state


class LogDecayShapes(NamedTuple):
    """The sizes of a call; `length` is a multiple of `chunk`."""

    batch: int
    length: int
    query_heads: int
    heads: int
    key: int
    value: int
    chunk: int
    dtype: np.dtype  # of the kernel's q, k and v
    gate: str  # "none", "scalar" or "channel"
    segments: int  # with a state each: a chunk may start from another than its predecessor's; 0: one state per row


class LogDecayPlan(NamedTuple):
    """The static settings of a call. interpret: interprets kernels (`dispatch.interpreted_kernels`)."""

    chunk: int
    scale: float
    interpret: bool = False
