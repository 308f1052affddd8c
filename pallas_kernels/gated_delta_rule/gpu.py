"""The gated delta rule on GPUs of compute capability 9.0.

Values of more than 128 columns are split into blocks that count as heads (`mosaic_gpu.widths`).

With one gate per head or none, the forward pass computes the inverses X of all chunks at once, then carries the state
in one pass. The backward pass uses the written values W = X R with R = beta (v - decay k S):

    states   forwards again: W and the states S before each chunk
    dv       backwards: dW, dR = X^T dW, dv = beta dR, and dS
    dq       a sweep (`mosaic_gpu.scan`) forwards with S^T, (W, k) written: do reads dq, and dR reads the part of dk
             from keys as readers of the state, -beta dR S^T
    dk       two sweeps backwards: W reads the parts of dk from keys that are written, of a dS^T that comes from queries
             (do, q) and of one that comes from later keys (-beta dR, k); the registers do not hold both at once

The last two include the derivative of X: dA = -dR W^T. The gates' gradients are dot products: with G the cumulative log
decay of a chunk, dG_i = q_i . dq_i + k_i . (dk_i as a reader - dk_i as written), and dbeta_i = dR_i . (v_i - k_i's read
before its own token's write).

Under one gate per channel, the scores' sums over channels contain the decay. The stateless part runs for all chunks at
once (`mosaic_gpu.channel`): scores, inverses and decayed tokens before the walk along the chunks (`channel_scan`); the
gradients of q, k and the gates after the walks of S and dS. The gradients come first from do as it reads (q; k, W),
then from -beta dR as it reads (k; k, W).
"""

from functools import partial

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.gated_delta_rule.gpu_kernels import backward_states, forward_states, inverses
from engrax.pallas_kernels.gated_delta_rule.vjp import DeltaInputs, Residuals
from engrax.pallas_kernels.mosaic_gpu.channel import by_channel, channel_gates, prepare, token_gradients
from engrax.pallas_kernels.mosaic_gpu.channel_scan import backward_states as walk_backwards
from engrax.pallas_kernels.mosaic_gpu.channel_scan import forward_states as walk_forwards
from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, pack_gates
from engrax.pallas_kernels.mosaic_gpu.scan import Read, Write, decay_cotangent, sweep
from engrax.pallas_kernels.mosaic_gpu.widths import (
    Blocks,
    axes,
    gradients_from_blocks,
    outputs_from_blocks,
    outputs_to_blocks,
    sum_groups,
    sum_heads,
    to_blocks,
    unsupported_sizes,
)
from engrax.pallas_kernels.passes import Passes

NAME = "gated_delta_rule"
_INPUTS = DeltaInputs("BTHK", "BTHK", "BTHV", "BTH", "BTH", "BHKV", None)  # axes, for `shard_over_batch_and_heads`
_INVERSES = "BTHC"


def unsupported(shapes: LogDecayShapes) -> str | None:
    """Returns why the kernels cannot serve a call of these sizes, or None if they can."""
    return unsupported_sizes(shapes, splits_keys=False)


def forward(plan: LogDecayPlan, inputs: DeltaInputs) -> tuple[LogDecayOutputs, Residuals]:
    """Returns (out, final state) and the inverses."""
    run = _forward_by_channel if by_channel(inputs.decay) else _forward
    of_inputs, of_outputs = axes(inputs, _INPUTS)

    def blockwise(inputs):
        outputs, x = run(plan, to_blocks(inputs, inputs.beta))
        return outputs_from_blocks(outputs, inputs), x

    return shard_over_batch_and_heads(blockwise, (of_inputs,), (of_outputs, _INVERSES))(inputs)


def backward(plan: LogDecayPlan, inputs: DeltaInputs, residuals: Residuals, cotangents: LogDecayOutputs) -> DeltaInputs:
    """Returns the cotangents of the inputs; the decay's is the cotangent of its `lo`."""
    run = _backward_by_channel if by_channel(inputs.decay) else _backward
    of_inputs, of_outputs = axes(inputs, _INPUTS)

    def blockwise(inputs, x, cotangents):
        bars = run(plan, to_blocks(inputs, inputs.beta), x, outputs_to_blocks(cotangents))
        return gradients_from_blocks(bars, inputs)._replace(beta=bars.beta)

    dims = (of_inputs, _INVERSES, of_outputs)
    return shard_over_batch_and_heads(blockwise, dims, of_inputs._replace(layout=None))(inputs, residuals, cotangents)


passes = Passes(forward, backward)


def _decay(blocks: Blocks) -> Decay:
    """The decay; without gates, that of gates of 0."""
    return Decay(jnp.zeros_like(blocks.beta), jnp.zeros_like(blocks.beta)) if blocks.decay is None else blocks.decay


def _forward(plan: LogDecayPlan, blocks: Blocks) -> tuple[tuple, jax.Array]:
    gates = pack_gates(_decay(blocks), factor=blocks.beta)
    x = inverses(f"{NAME}_inverse", blocks.k, gates, plan.interpret)
    arrays = (*blocks[:3], x, gates, blocks.state, blocks.bounds)
    found = forward_states(f"{NAME}_forward", *arrays, scale=plan.scale, interpret=plan.interpret)
    return (found.out, found.final), x


def _backward(plan: LogDecayPlan, blocks: Blocks, x: jax.Array, cotangents: tuple) -> Blocks:
    q, k, v, beta, _, state, bounds = blocks
    out_bar, final_bar = cotangents
    decay, interpret = _decay(blocks), plan.interpret
    gates, gates_back = pack_gates(decay, factor=beta), pack_gates(decay, reverse=True, factor=beta)
    again = forward_states(f"{NAME}_backward_states", None, k, v, x, gates, state, bounds, interpret=interpret)
    arrays = (q, k, v, x, out_bar, gates_back, final_bar, again.states, state, bounds)
    back = backward_states(f"{NAME}_backward_dv", *arrays, scale=plan.scale, interpret=interpret)
    # Two parts of dk are added, and grouped heads and blocks are summed, so these stay unrounded.
    run = partial(sweep, bounds=bounds, out_dtype=jnp.float32, interpret=interpret)
    readers = run(
        f"{NAME}_backward_dq",
        [Read(out_bar, plan.scale, dot_with=q), Read(back.rows_bar, -1.0, True, by_factor=True, dot_with=k)],
        Write(again.written, k),
        gates,
        state.swapaxes(2, 3),
    )
    back_run = partial(run, gates=gates_back, reverse=True)
    reads, final_bar = [Read(again.written, dot_with=k)], final_bar.swapaxes(2, 3)
    for_queries = back_run(f"{NAME}_backward_dk", reads, Write(out_bar, q, plan.scale), start=final_bar)
    write = Write(back.rows_bar, k, -1.0, True, by_factor=True)
    for_keys = back_run(f"{NAME}_backward_dk_of_keys", reads, write, start=jnp.zeros_like(final_bar))
    per_gate = partial(sum_heads, heads=beta.shape[2])
    of_q, of_reader = (per_gate(a + b) for a, b in zip(readers.local_dots, readers.carried_dots))
    beta_bar = per_gate(back.dots) + of_reader
    decay_bar = None
    if blocks.decay is not None:
        local = per_gate(for_queries.local_dots[0] + for_keys.local_dots[0])
        carried = per_gate(for_queries.carried_dots[0] + for_keys.carried_dots[0])
        by_token = of_q + beta * of_reader - (local + carried)
        decay_bar = decay_cotangent(decay, by_token, carried, per_gate(back.matches, axis=1), gates)
    q_bar = sum_groups(readers.outs[0], q)
    k_bar = sum_groups(readers.outs[1] + for_queries.outs[0] + for_keys.outs[0], k)
    return Blocks(q_bar, k_bar, back.v_bar, beta_bar.astype(beta.dtype), decay_bar, back.start_bar, None)


def _by_chunk(beta: jax.Array) -> jax.Array:
    """Returns `[B, T, HV]` as `[B, HV, N, C]`."""
    return beta.reshape(beta.shape[0], -1, CHUNK, beta.shape[2]).transpose(0, 3, 1, 2)


def _forward_by_channel(plan: LogDecayPlan, blocks: Blocks) -> tuple[tuple, jax.Array]:
    q, k, v, beta, decay, state, bounds = blocks
    gates, factors = channel_gates(decay), dict(beta=_by_chunk(beta), interpret=plan.interpret)
    tokens = prepare(f"{NAME}_forward_tokens", q, k, gates, readers=True, **factors)
    arrays = (tokens, v, gates.whole, state)
    found = walk_forwards(f"{NAME}_forward", *arrays, bounds=bounds, scale=plan.scale, **factors)
    return (found.out, found.final), tokens.inverse


def _backward_by_channel(plan: LogDecayPlan, blocks: Blocks, x: jax.Array, cotangents: tuple) -> Blocks:
    q, k, v, beta, decay, state, bounds = blocks
    out_bar, final_bar = cotangents
    gates, interpret = channel_gates(decay), plan.interpret
    factors = dict(beta=_by_chunk(beta), bounds=bounds, interpret=interpret)
    tokens = prepare(f"{NAME}_backward_tokens", q, k, gates, readers=True, interpret=interpret)._replace(inverse=x)
    arrays = (tokens, out_bar, gates.whole, final_bar)
    back = walk_backwards(f"{NAME}_backward_dv", *arrays, scale=plan.scale, **factors)
    arrays = (tokens, v, gates.whole, state, (back.states, final_bar))
    again = walk_forwards(f"{NAME}_backward_states", *arrays, **factors)
    arrays, options = (k, again.written, gates), dict(scale=plan.scale, interpret=interpret)
    ends = (again.states, back.states, again.matches)
    of_q = token_gradients(f"{NAME}_backward_dqk", q, *arrays, out_bar, *ends, **options)
    options |= dict(scale=-1.0, factor=factors["beta"], strict=True)
    of_reader = token_gradients(f"{NAME}_backward_dk", k, *arrays, back.rows, again.states, **options)
    # Both terms use the same rounded dR: v and k's read nearly cancel when the memory is accurate.
    keys = jnp.repeat(k, beta.shape[2] // k.shape[2], axis=2)
    beta_bar = sum_heads(_dots(back.rows, v), beta.shape[2]) + _dots(of_reader.rows, keys)
    gates_bar = of_q.gates + of_reader.gates
    decay_bar = Decay(jnp.zeros_like(decay.hi), gates_bar.astype(decay.lo.dtype))
    k_bar = sum_groups(of_q.keys + of_reader.keys + beta[..., None] * of_reader.rows, k)
    return Blocks(sum_groups(of_q.rows, q), k_bar, back.v, beta_bar.astype(beta.dtype), decay_bar, back.start, None)


def _dots(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the dot products along the last axis."""
    return jnp.sum(a.astype(jnp.float32) * b.astype(jnp.float32), axis=-1)
