"""The core of linear attention and its derivative, each through the implementation that serves the call.

Nothing is saved but the inputs: the backward pass runs the states forward again, which costs one product in ten.
"""

from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.segments import SegmentLayout
from engrax.pallas_kernels.dispatch import LogDecayPlan, by_platform, load

OP = "linear_attention"


class LinearInputs(NamedTuple):
    """What every implementation below `api` gets: T a multiple of the chunk, padding with k = v = 0 and no decay.

    q, k, v share a dtype; decay and state have the accumulator's. decay: hi and lo `[B, T, HV]` or `[B, T, HV, K]`,
    cumulative inside each chunk. layout: None, or where a chunk begins from the state of another segment; then the
    states are one per segment, `[B, N, HV, K, V]`.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    decay: Decay | None
    state: Float[Array, "B *N HV K V"]
    layout: SegmentLayout | None


Outputs = tuple[Float[Array, "B T HV V"], Float[Array, "B *N HV K V"]]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: LogDecayPlan, inputs: LinearInputs) -> Outputs:
    """Returns (out in v's dtype, final state)."""
    return _forward(plan, inputs)[0]


def _forward(plan, inputs):
    branches = {name: partial(load(OP, name).forward, plan) for name in plan.candidates}
    outputs, residuals = by_platform(plan.implementation, branches, inputs)
    return outputs, (inputs, residuals)


def _backward(plan, saved, cotangents):
    branches = {name: partial(load(OP, name).backward, plan) for name in plan.candidates}
    return (by_platform(plan.implementation, branches, *saved, cotangents),)


attend.defvjp(_forward, _backward)
