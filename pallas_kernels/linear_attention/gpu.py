"""Linear attention on GPUs of compute capability 9.0: the output and its three gradients are one sweep each.

    out = sweep(q; k, v)             dq = sweep(do; v, k)            states S and S^T, forwards
    dv  = reverse(k; q, do)          dk = reverse(v; do, q)          states dS and dS^T, backwards

A program owns 64 columns of a state and of the output read from it. So a head splits into V / 64 or K / 64 programs,
and no gradient is a sum over programs. A state has at most 128 rows: more of V's are blocks of values
(`mosaic_gpu.widths`), and of K's, several sweeps are added up. The gate's gradient follows: with G the cumulative log
decay of a chunk, dG_i = q_i . dq_i - k_i . dk_i. The chunk's last token adds the state's part, for which the sweep of
dq stores the chunks' states (bfloat16) for the sweep of dk. Without gates, no state leaves the chip.

Under one gate per channel, the decay is part of the scores' sums over channels. The stateless part runs for all chunks
at once (`mosaic_gpu.channel`): scores and decayed tokens before the walk along the chunks (`channel_scan`); the
gradients of q, k and the gates after the walks of S and dS, from the states of all chunks that these store.
"""

from functools import partial, reduce

import jax.numpy as jnp

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
from engrax.pallas_kernels.mosaic_gpu.channel import by_channel, channel_gates, prepare, token_gradients
from engrax.pallas_kernels.mosaic_gpu.channel_scan import backward_states, forward_states
from engrax.pallas_kernels.mosaic_gpu.parts import pack_gates
from engrax.pallas_kernels.mosaic_gpu.scan import Read, Write, decay_cotangent, sweep
from engrax.pallas_kernels.mosaic_gpu.widths import (
    Blocks,
    axes,
    gradients_from_blocks,
    key_blocks,
    outputs_from_blocks,
    outputs_to_blocks,
    sum_groups,
    sum_heads,
    to_blocks,
    unsupported_sizes,
)
from engrax.pallas_kernels.passes import Passes

NAME = "linear_attention"


def unsupported(shapes: LogDecayShapes) -> str | None:
    """Returns why the kernels cannot serve a call of these sizes, or None if they can."""
    return unsupported_sizes(shapes, splits_keys=shapes.gate != "channel")


def forward(plan: LogDecayPlan, inputs: LinearInputs) -> tuple[LogDecayOutputs, tuple]:
    """Returns ((out in v's dtype, final state), no residuals)."""
    run = _forward_by_channel if by_channel(inputs.decay) else _forward
    of_inputs, of_outputs = axes(inputs, _INPUTS)

    def blockwise(inputs):
        return outputs_from_blocks(run(plan, to_blocks(inputs)), inputs)

    return shard_over_batch_and_heads(blockwise, (of_inputs,), of_outputs)(inputs), ()


def backward(plan: LogDecayPlan, inputs: LinearInputs, residuals: tuple, cotangents: LogDecayOutputs) -> LinearInputs:
    """Returns the cotangents of the inputs; the decay's is the cotangent of its `lo`."""
    run = _backward_by_channel if by_channel(inputs.decay) else _backward
    of_inputs, of_outputs = axes(inputs, _INPUTS)

    def blockwise(inputs, cotangents):
        bars = run(plan, to_blocks(inputs), outputs_to_blocks(cotangents))
        return gradients_from_blocks(bars, inputs)

    dims = (of_inputs, of_outputs)
    return shard_over_batch_and_heads(blockwise, dims, of_inputs._replace(layout=None))(inputs, cotangents)


passes = Passes(forward, backward)


_INPUTS = LinearInputs("BTHK", "BTHK", "BTHV", "BTH", "BHKV", None)  # axes, for `shard_over_batch_and_heads`


def _forward(plan: LogDecayPlan, blocks: Blocks) -> tuple:
    q, k, v, _, decay, state, bounds = blocks
    run = partial(sweep, gates=pack_gates(decay), bounds=bounds, interpret=plan.interpret)
    return _by_keys(f"{NAME}_forward", run, Read(q, plan.scale), Write(k, v), state)


def _by_keys(name: str, run, read: Read, write: Write, start):
    """Returns the outputs and final states of a sweep that adds up the blocks of K features of its rows and keys."""
    blocks, swept = key_blocks(start.shape[2]), []
    out_dtype = jnp.bfloat16 if len(blocks) == 1 else jnp.float32
    for block in blocks:
        named = f"{name}_{block.start}" if block.start else name
        reads = [read._replace(rows=read.rows[..., block])]
        part = write._replace(keys=write.keys[..., block])
        swept.append(run(named, reads, part, start=start[:, :, block], out_dtype=out_dtype))
    out = reduce(jnp.add, (found.outs[0] for found in swept))
    return out.astype(jnp.bfloat16), jnp.concatenate([found.final for found in swept], axis=2)


def _backward(plan: LogDecayPlan, blocks: Blocks, cotangents: tuple) -> Blocks:
    q, k, v, _, decay, state, bounds = blocks
    out_bar, final_bar = cotangents
    gates, gates_back = pack_gates(decay), pack_gates(decay, reverse=True)
    run = partial(sweep, bounds=bounds, interpret=plan.interpret)
    # Gradients of q and k are per block of values here. Blocks and grouped heads are summed later, so these stay
    # unrounded.
    start = state.swapaxes(2, 3)
    by_value_head = dict(out_dtype=jnp.bfloat16 if q.shape[2] == v.shape[2] else jnp.float32)
    of_q = run(
        f"{NAME}_backward_dq",
        [Read(out_bar, plan.scale, dot_with=None if decay is None else q)],
        Write(v, k),
        gates,
        start,
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
        match_with=None if decay is None else (of_q.states, start),
        **by_value_head,
    )
    back = partial(run, gates=gates_back, reverse=True)
    write = Write(q, out_bar, plan.scale)
    v_bar, start_bar = _by_keys(f"{NAME}_backward_dv", back, Read(k), write, final_bar)
    decay_bar = None
    if decay is not None:
        per_gate = partial(sum_heads, heads=decay.hi.shape[2])
        local, carried = of_q.local_dots[0] - of_k.local_dots[0], of_q.carried_dots[0] - of_k.carried_dots[0]
        ends, matches = per_gate(of_k.carried_dots[0]), per_gate(of_k.matches, axis=1)
        decay_bar = decay_cotangent(decay, per_gate(local + carried), ends, matches, gates)
    q_bar, k_bar = (sum_groups(x, q) for x in (of_q.outs[0], of_k.outs[0]))
    return Blocks(q_bar, k_bar, v_bar, None, decay_bar, start_bar, None)


def _forward_by_channel(plan: LogDecayPlan, blocks: Blocks) -> tuple:
    q, k, v, _, decay, state, bounds = blocks
    gates = channel_gates(decay)
    tokens = prepare(f"{NAME}_forward_tokens", q, k, gates, interpret=plan.interpret)
    options = dict(bounds=bounds, scale=plan.scale, interpret=plan.interpret)
    found = forward_states(f"{NAME}_forward", tokens, v, gates.whole, state, **options)
    return found.out, found.final


def _backward_by_channel(plan: LogDecayPlan, blocks: Blocks, cotangents: tuple) -> Blocks:
    q, k, v, _, decay, state, bounds = blocks
    out_bar, final_bar = cotangents
    gates, interpret = channel_gates(decay), plan.interpret
    tokens = prepare(f"{NAME}_backward_tokens", q, k, gates, interpret=interpret)
    walked = dict(bounds=bounds, interpret=interpret)
    back = backward_states(f"{NAME}_backward_dv", tokens, out_bar, gates.whole, final_bar, scale=plan.scale, **walked)
    ends = (back.states, final_bar)
    again = forward_states(f"{NAME}_backward_states", tokens, v, gates.whole, state, ends, **walked)
    of_tokens = token_gradients(
        f"{NAME}_backward_dqk",
        *(q, k, v, gates, out_bar, again.states, back.states, again.matches),
        scale=plan.scale,
        out_dtype=jnp.bfloat16 if q.shape[2] == v.shape[2] else jnp.float32,
        interpret=interpret,
    )
    decay_bar = Decay(jnp.zeros_like(decay.hi), of_tokens.gates.astype(decay.lo.dtype))
    q_bar, k_bar = sum_groups(of_tokens.rows, q), sum_groups(of_tokens.keys, k)
    return Blocks(q_bar, k_bar, back.v, None, decay_bar, back.start, None)
