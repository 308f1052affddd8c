"""The core of the gated delta rule and its derivative, each through the implementation that serves the call.

Saved beside the inputs: the inverses X = (I + A)^-1 of the chunks, C numbers per token and head. They are float32
even for tokens in bfloat16: rounded, they make the gradients of correlated keys up to 50 times worse. Everything else
is computed again: scores and written values chunk by chunk, the states in a forward sweep of the backward pass.
"""

from functools import partial
from typing import NamedTuple

import jax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.segments import SegmentLayout
from engrax.pallas_kernels.dispatch import LogDecayPlan, by_platform, load

OP = "gated_delta_rule"


class DeltaInputs(NamedTuple):
    """What every implementation below `api` gets: T a multiple of the chunk, padding with k = v = beta = 0, no decay.

    q, k, v share a dtype; beta, decay and state have the accumulator's. decay: hi and lo `[B, T, HV]` or
    `[B, T, HV, K]`, cumulative inside each chunk. layout: None, or where a chunk begins from the state of another
    segment; then the states are one per segment, `[B, N, HV, K, V]`.
    """

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HV V"]
    beta: Float[Array, "B T HV"]
    decay: Decay | None
    state: Float[Array, "B *N HV K V"]
    layout: SegmentLayout | None


Outputs = tuple[Float[Array, "B T HV V"], Float[Array, "B *N HV K V"]]
Residuals = Float[Array, "B T HV C"]  # the rows of X, in the accumulator's dtype


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_rule(plan: LogDecayPlan, inputs: DeltaInputs) -> Outputs:
    """Returns (out in v's dtype, final state)."""
    return _forward(plan, inputs)[0]


def _forward(plan, inputs):
    branches = {name: partial(load(OP, name).forward, plan) for name in plan.candidates}
    outputs, inverses = by_platform(plan.implementation, branches, inputs)
    return outputs, (inputs, inverses)


def _backward(plan, saved, cotangents):
    branches = {name: partial(load(OP, name).backward, plan) for name in plan.candidates}
    return (by_platform(plan.implementation, branches, *saved, cotangents),)


apply_rule.defvjp(_forward, _backward)
