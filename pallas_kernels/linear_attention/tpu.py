"""Linear attention on TPU: kernels for `chunk` and its derivative, walking each row and head's chunks in order."""

from functools import partial

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.common.matmul import COLUMNS, ROWS, dot
from engrax.pallas_kernels.linear_attention.chunk import ScalarDecay, chunk, write
from engrax.pallas_kernels.linear_attention.vjp import OP, LinearInputs
from engrax.pallas_kernels.mosaic_tpu.channel import channel_scores
from engrax.pallas_kernels.mosaic_tpu.chunks import (
    ChunkKernels,
    load_decay,
    pack_decay,
    store_decay_bar,
    to_chunks,
    to_tokens,
    unpack_decay_bar,
    unsupported_sizes,
    walk_backward,
    walk_forward,
)
from engrax.pallas_kernels.passes import Passes


def unsupported(shapes: LogDecayShapes) -> str | None:
    """Returns why the kernels cannot serve a call of these sizes, or None if they can."""
    return unsupported_sizes(shapes)


def forward(plan: LogDecayPlan, inputs: LinearInputs) -> tuple[LogDecayOutputs, tuple]:
    """Returns ((out in v's dtype, final state), no residuals)."""
    walk, tokens = _prepare(plan, inputs)
    out, final, _ = walk_forward(walk, tokens, inputs.state, inputs.layout)
    return (to_tokens(out), final), ()


def backward(plan: LogDecayPlan, inputs: LinearInputs, residuals: tuple, cotangents: LogDecayOutputs) -> LinearInputs:
    """Returns the cotangents of the inputs; the decay's is the cotangent of its `lo`."""
    walk, tokens = _prepare(plan, inputs)
    out_bar = to_chunks(cotangents[0], plan.chunk)
    bars, state_bar = walk_backward(walk, tokens, inputs.state, inputs.layout, out_bar, cotangents[1])
    qkv_bar = (to_tokens(bars[name]) for name in "qkv")
    return LinearInputs(*qkv_bar, unpack_decay_bar(bars, inputs.decay), state_bar, None)


passes = Passes(forward, backward)


def _prepare(plan: LogDecayPlan, inputs: LinearInputs):
    decay = pack_decay(inputs.decay, plan.chunk)
    tokens = {name: to_chunks(getattr(inputs, name), plan.chunk) for name in "qkv"} | decay
    run = partial(_chunk, plan.scale, inputs.q.dtype)
    wrt = tuple(name for name in tokens if name != "hi")
    return ChunkKernels(OP, partial(_step, run), partial(_pull, run), wrt, plan.interpret), tokens


def _chunk(scale, dtype, his, q, k, v, los, state):
    """`chunk` with the parts of the decay separate, since only `lo` has a cotangent."""
    decay = tuple(Decay(hi, lo) for hi, lo in zip(his, los))
    if len(decay) == 1:
        return _channel_chunk(scale, dtype, q, k, v, *decay, state)
    return chunk(q, k, v, ScalarDecay(*decay) if decay else None, state, scale=scale, dtype=dtype)


def _channel_chunk(scale, dtype, q, k, v, decay: Decay, state):
    """`chunk` with the scores computed as kernels need."""
    keep, update = write(k, v, decay, dtype=dtype)
    (scores,) = channel_scores((q,), k, decay, dtype)
    carried = dot(q * jnp.exp(decay.hi + decay.lo), state, COLUMNS, ROWS, dtype)
    return scale * (carried + dot(scores, v, COLUMNS, ROWS, dtype)), keep * state + update


def _parts(tokens):
    decay = load_decay(tokens)
    qkv = (tokens[name].astype(jnp.float32) for name in "qkv")
    return tuple(d.hi for d in decay), (*qkv, tuple(d.lo for d in decay))


def _step(run, tokens, state):
    his, args = _parts(tokens)
    return *run(his, *args, state), None


def _pull(run, tokens, state, out_bar, after_bar):
    his, args = _parts(tokens)
    _, pull = jax.vjp(partial(run, his), *args, state)
    q_bar, k_bar, v_bar, lo_bars, state_bar = pull((out_bar.astype(jnp.float32), after_bar))
    return {"q": q_bar, "k": k_bar, "v": v_bar} | store_decay_bar(lo_bars), state_bar
