"""Linear attention on GPUs of compute capability 9.0: the output and its three gradients are one sweep each.

    out = sweep(q; k, v)             dq = sweep(do; v, k)            states S and S^T, forwards
    dv  = reverse(k; q, do)          dk = reverse(v; do, q)          states dS and dS^T, backwards

A program owns 64 columns of a state and of the output read from it. So a head splits into V / 64 or K / 64 programs,
and no gradient is a sum over programs. The gate's gradient follows: with G the cumulative log decay of a chunk, dG_i =
q_i . dq_i - k_i . dk_i. The chunk's last token adds the state's part, for which the sweep of dq stores the chunks'
states (bfloat16) for the sweep of dk. Without gates, no state leaves the chip.

Under one gate per channel, the decay is part of the scores' sums over channels. The stateless part runs for all chunks
at once (`mosaic_gpu.channel`): scores and decayed tokens before the walk along the chunks (`channel_scan`); the
gradients of q, k and the gates after the walks of S and dS, from the states of all chunks that these store.
"""

from functools import partial

import jax.numpy as jnp

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
from engrax.pallas_kernels.mosaic_gpu.channel import by_channel, channel_gates, prepare, token_gradients
from engrax.pallas_kernels.mosaic_gpu.channel_scan import backward_states, forward_states
from engrax.pallas_kernels.mosaic_gpu.parts import pack_gates, unsupported_sizes
from engrax.pallas_kernels.mosaic_gpu.scan import Read, Write, decay_cotangent, sum_groups, sweep
from engrax.pallas_kernels.passes import Passes

NAME = "linear_attention"


def unsupported(shapes: LogDecayShapes) -> str | None:
    """Returns why the kernels cannot serve a call of these sizes, or None if they can."""
    return unsupported_sizes(shapes)


def forward(plan: LogDecayPlan, inputs: LinearInputs) -> tuple[LogDecayOutputs, tuple]:
    """Returns ((out in v's dtype, final state), no residuals)."""
    run = _forward_by_channel if by_channel(inputs.decay) else _forward
    return shard_over_batch_and_heads(partial(run, plan), (_INPUTS,), _OUTPUTS)(inputs), ()


def backward(plan: LogDecayPlan, inputs: LinearInputs, residuals: tuple, cotangents: LogDecayOutputs) -> LinearInputs:
    """Returns the cotangents of the inputs; the decay's is the cotangent of its `lo`."""
    run = _backward_by_channel if by_channel(inputs.decay) else _backward
    return shard_over_batch_and_heads(partial(run, plan), (_INPUTS, _OUTPUTS), _INPUTS)(inputs, cotangents)


passes = Passes(forward, backward)


_INPUTS = LinearInputs("BTHK", "BTHK", "BTHV", "BTH", "BHKV", None)  # axes, for `shard_over_batch_and_heads`
_OUTPUTS = ("BTHV", "BHKV")


def _forward(plan: LogDecayPlan, inputs: LinearInputs) -> LogDecayOutputs:
    q, k, v, decay, state, _ = inputs
    reads, write = [Read(q, plan.scale)], Write(k, v)
    swept = sweep(f"{NAME}_forward", reads, write, pack_gates(decay), state, interpret=plan.interpret)
    return swept.outs[0], swept.final


def _backward(plan: LogDecayPlan, inputs: LinearInputs, cotangents: LogDecayOutputs) -> LinearInputs:
    q, k, v, decay, state, _ = inputs
    out_bar, final_bar = cotangents
    gates, gates_back = pack_gates(decay), pack_gates(decay, reverse=True)
    run = partial(sweep, interpret=plan.interpret)
    # Gradients of q and k are per value head here. Grouped heads are summed later, so these stay unrounded.
    by_value_head = dict(out_dtype=jnp.bfloat16 if q.shape[2] == v.shape[2] else jnp.float32)
    of_q = run(
        f"{NAME}_backward_dq",
        [Read(out_bar, plan.scale, dot_with=None if decay is None else q)],
        Write(v, k),
        gates,
        state.swapaxes(2, 3),
        save_states=decay is not None,
        **by_value_head,
    )
    of_k = run(
        f"{NAME}_backward_dk",
        [Read(v, dot_with=None if decay is None else k)],
        Write(out_bar, q, plan.scale),
        gates_back,
        final_bar.swapaxes(2, 3),
        reverse=True,
        match_with=of_q.states,
        **by_value_head,
    )
    of_v = run(
        f"{NAME}_backward_dv",
        [Read(k)],
        Write(q, out_bar, plan.scale),
        gates_back,
        final_bar,
        reverse=True,
    )
    decay_bar = None
    if decay is not None:
        local, carried = of_q.local_dots[0] - of_k.local_dots[0], of_q.carried_dots[0] - of_k.carried_dots[0]
        decay_bar = decay_cotangent(decay, local + carried, of_k.carried_dots[0], of_k.matches, gates)
    q_bar, k_bar = (sum_groups(x, q) for x in (of_q.outs[0], of_k.outs[0]))
    return LinearInputs(q_bar, k_bar, of_v.outs[0], decay_bar, of_v.final, None)


def _forward_by_channel(plan: LogDecayPlan, inputs: LinearInputs) -> LogDecayOutputs:
    q, k, v, decay, state, _ = inputs
    gates = channel_gates(decay)
    tokens = prepare(f"{NAME}_forward_tokens", q, k, gates, interpret=plan.interpret)
    options = dict(scale=plan.scale, interpret=plan.interpret)
    found = forward_states(f"{NAME}_forward", tokens, v, gates.whole, state, **options)
    return found.out, found.final


def _backward_by_channel(plan: LogDecayPlan, inputs: LinearInputs, cotangents: LogDecayOutputs) -> LinearInputs:
    q, k, v, decay, state, _ = inputs
    out_bar, final_bar = cotangents
    gates, interpret = channel_gates(decay), plan.interpret
    tokens = prepare(f"{NAME}_backward_tokens", q, k, gates, interpret=interpret)
    arrays = (tokens, out_bar, gates.whole, final_bar)
    back = backward_states(f"{NAME}_backward_dv", *arrays, scale=plan.scale, interpret=interpret)
    arrays = (tokens, v, gates.whole, state, back.states)
    again = forward_states(f"{NAME}_backward_states", *arrays, interpret=interpret)
    of_tokens = token_gradients(
        f"{NAME}_backward_dqk",
        *(q, k, v, gates, out_bar, again.states, back.states, again.matches),
        scale=plan.scale,
        out_dtype=jnp.bfloat16 if q.shape[2] == v.shape[2] else jnp.float32,
        interpret=interpret,
    )
    decay_bar = Decay(jnp.zeros_like(decay.hi), of_tokens.gates.astype(decay.lo.dtype))
    return LinearInputs(
        sum_groups(of_tokens.rows, q), sum_groups(of_tokens.keys, k), back.v, decay_bar, back.start, None
    )
