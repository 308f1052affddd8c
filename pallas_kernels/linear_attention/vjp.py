"""The inputs of every implementation of linear attention's core.

Nothing else is saved for the backward pass. It recomputes the states, which costs one product in ten.
"""

from typing import NamedTuple

from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.segments import SegmentLayout

OP = "linear_attention"


class LinearInputs(NamedTuple):
    """The inputs of every implementation below `api`. T is a multiple of the chunk; padding has k = v = 0 and no decay.

    q, k, v share a dtype; decay and state have the accumulator's. decay: hi and lo `[B, T, HV]` or `[B, T, HV, K]`,
    cumulative inside each chunk. layout: None, or says where a chunk starts from another segment's state. There is then
    one state per segment, `[B, N, HV, K, V]`.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    decay: Decay | None
    state: Float[Array, "B *N HV K V"]
    layout: SegmentLayout | None
