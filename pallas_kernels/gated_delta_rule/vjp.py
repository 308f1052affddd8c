"""The inputs of every implementation of the gated delta rule's core, and the residuals for the backward pass.

Besides the inputs, the inverses X = (I + A)^-1 of the chunks are saved, C numbers per token and head. They are float32
even for bfloat16 tokens, because rounding makes the gradients of correlated keys up to 50 times worse. Everything else
is recomputed: scores and written values chunk by chunk, the states in a forward sweep of the backward pass.
"""

from typing import NamedTuple

from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.segments import SegmentLayout

OP = "gated_delta_rule"


class DeltaInputs(NamedTuple):
    """The inputs of all implementations below `api`. T is a multiple of the chunk; padding: k = v = beta = 0, no decay.

    q, k, v share a dtype; beta, decay and state have the accumulator's. decay: hi and lo `[B, T, HV]` or
    `[B, T, HV, K]`, cumulative inside each chunk. layout: None, or says where a chunk starts from another segment's
    state. There is then one state per segment, `[B, N, HV, K, V]`.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    beta: Float[Array, "B T HV"]
    decay: Decay | None
    state: Float[Array, "B *N HV K V"]
    layout: SegmentLayout | None


Residuals = Float[Array, "B T HV C"]  # the rows of X, in the accumulator's dtype
