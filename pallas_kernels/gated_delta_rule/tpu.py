"""The gated delta rule on TPU: kernels for `chunk` and its derivative, walking each row and head's chunks in order.

The forward kernel inverts by the ladder, with whole products and masks only. The backward kernels get the inverses.
"""

from functools import partial

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.gated_delta_rule.chunk import DeltaForm, DeltaTokens, advance, chunk, local, output
from engrax.pallas_kernels.gated_delta_rule.inverse import ladder_inverse
from engrax.pallas_kernels.gated_delta_rule.vjp import OP, DeltaInputs, Residuals
from engrax.pallas_kernels.linear_attention.chunk import ScalarDecay
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


def forward(plan: LogDecayPlan, inputs: DeltaInputs) -> tuple[LogDecayOutputs, Residuals]:
    """Returns (out in v's dtype, final state) and the inverses."""
    walk, tokens = _prepare(plan, inputs)
    more = jax.ShapeDtypeStruct((plan.chunk, plan.chunk), jnp.float32)
    out, final, inverses = walk_forward(walk, tokens, inputs.state, inputs.layout, more)
    return (to_tokens(out), final), to_tokens(inverses)


def backward(plan: LogDecayPlan, inputs: DeltaInputs, residuals: Residuals, cotangents: LogDecayOutputs) -> DeltaInputs:
    """Returns the cotangents of the inputs; the decay's is the cotangent of its `lo`."""
    walk, tokens = _prepare(plan, inputs)
    tokens["inverse"] = to_chunks(residuals, plan.chunk)
    out_bar = to_chunks(cotangents[0], plan.chunk)
    bars, state_bar = walk_backward(walk, tokens, inputs.state, inputs.layout, out_bar, cotangents[1])
    qkv_bar = (to_tokens(bars[name]) for name in "qkv")
    beta_bar = to_tokens(bars["beta"][:, :, :, 0])
    return DeltaInputs(*qkv_bar, beta_bar, unpack_decay_bar(bars, inputs.decay), state_bar, None)


passes = Passes(forward, backward)


def _prepare(plan: LogDecayPlan, inputs: DeltaInputs):
    tokens = {name: to_chunks(getattr(inputs, name), plan.chunk) for name in "qkv"}
    tokens["beta"] = to_chunks(inputs.beta, plan.chunk)[:, :, :, None]  # a row: a column would take the memory of 128
    tokens |= pack_decay(inputs.decay, plan.chunk)
    form = DeltaForm(plan.scale, inputs.q.dtype)
    wrt = tuple(name for name in tokens if name != "hi")
    return ChunkKernels(OP, partial(_step, form), partial(_pull, form), wrt, plan.interpret), tokens


def _tokens(his, q, k, v, beta, los) -> DeltaTokens:
    """Takes the parts of the decay separately, since only `lo` has a cotangent."""
    decay = tuple(Decay(hi, lo) for hi, lo in zip(his, los))
    return DeltaTokens(q, k, v, beta, ScalarDecay(*decay) if len(decay) == 2 else (decay[0] if decay else None))


def _chunk(form: DeltaForm, inverse, tokens: DeltaTokens, state):
    return chunk(form, tokens, state, inverse, ladder_inverse, channel_scores)


def _parts(tokens):
    decay = load_decay(tokens)
    qkv = (tokens[name].astype(jnp.float32) for name in "qkv")
    return tokens.get("inverse"), tuple(d.hi for d in decay), (*qkv, tokens["beta"].T, tuple(d.lo for d in decay))


def _step(form, tokens, state):
    inverse, his, args = _parts(tokens)
    tokens = _tokens(his, *args)
    if isinstance(tokens.decay, Decay):
        (out, after), inverse = _chunk(form, inverse, tokens, state)
        return out, after, inverse
    # As in the XLA form, beta and the decay multiply X, and k and v enter their products unrounded.
    part = local(form, tokens, inverse, ladder_inverse)
    after, written = advance(form, tokens, part, state)
    return output(form, tokens, part.scores, written, state), after, part.inverse


def _pull(form, tokens, state, out_bar, after_bar):
    inverse, his, args = _parts(tokens)
    _, pull = jax.vjp(lambda *args: _chunk(form, inverse, _tokens(his, *args[:-1]), args[-1])[0], *args, state)
    q_bar, k_bar, v_bar, beta_bar, lo_bars, state_bar = pull((out_bar.astype(jnp.float32), after_bar))
    bars = {"q": q_bar, "k": k_bar, "v": v_bar, "beta": beta_bar.T}
    return bars | store_decay_bar(lo_bars), state_bar
