"""The public operation `gated_delta_rule`: contract, validation and choice of an implementation."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.common.canonicalize import call_shapes, lay_out, take_back, token_dtype
from engrax.pallas_kernels.common.decay import chunk_decay
from engrax.pallas_kernels.common.log_decay import LogDecayPlan
from engrax.pallas_kernels.common.matmul import accumulator
from engrax.pallas_kernels.common.validation import (
    check_array,
    check_decay,
    check_positive_int,
    check_scale,
    check_segments,
    check_tokens,
)
from engrax.pallas_kernels.dispatch import choose
from engrax.pallas_kernels.gated_delta_rule.reference import gated_delta_rule_reference
from engrax.pallas_kernels.gated_delta_rule.vjp import OP, DeltaInputs


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
def gated_delta_rule(
    q,
    k,
    v,
    *,
    beta,
    g=None,
    scale=None,
    initial_state=None,
    segment_ids=None,
    num_segments=None,
    chunk_size=64,
    implementation=None,
):
    """Moves the read of every token's key from a decaying matrix towards the token's value, then reads with its query.

    For every row and value head j, with query head j // (HV // H):

        S = exp(g_t) S_{t-1},   S_t = S + beta_t k_t (v_t - S^T k_t)^T,   out_t = scale q_t S_t

    This is DeltaNet (arXiv:2406.06484) without a gate, Gated DeltaNet (arXiv:2412.06464) with one gate per head, and
    KDA (arXiv:2510.26692) with one per channel.

    Args:
      q, k: queries and keys `[B, T, H, K]`, any T >= 1; float64, float32, bfloat16 or float16. The state is bounded if
        keys have a norm of at most 1.
      v: values `[B, T, HV, V]`, HV a multiple of H.
      beta: strength of the correction `[B, T, HV]`, in [0, 2] (not checked); at 1, a unit key's read is replaced.
      g: log decay `[B, T, HV]` or `[B, T, HV, K]`, <= 0 (checked in debug mode only); -inf forgets everything, with
        zero gradient. None: no decay.
      scale: a number; None: K ** -0.5.
      initial_state: `[B, HV, K, V]`, with num_segments `[B, N, HV, K, V]`; None: zero.
      segment_ids: int `[B, T]`, non-decreasing along a row, -1 = padding, -2 = filler (no write, no decay, output 0,
        any input value allowed). Without num_segments, a row's first segment continues `initial_state`; later ones
        start from zero.
      num_segments: N: every segment id in [0, N) has its own state.
      chunk_size: tokens processed at once.
      implementation: None (choose), "reference" (token by token), "xla" (chunk by chunk), or a kernel,
        see `engrax.pallas_kernels.available`.

    Returns:
      out `[B, T, HV, V]` in v's dtype, and the final state, float32 (float64 if any input is): the state after the
      row's last real token, or with num_segments the final state of each segment (its initial state if the segment has
      no tokens).

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that cannot serve this call here; the message says why.
    """
    check_tokens(q, k, v)
    check_array("beta", beta, "[B, T, HV]", v.shape[:3])
    check_decay(g, q, v)
    check_segments(q, v, initial_state, segment_ids, num_segments)
    check_positive_int("chunk_size", chunk_size)
    scale = check_scale(scale, q.shape[3])
    dtype = token_dtype(q, k, v, beta, g, initial_state)
    shapes = call_shapes(q, v, g, dtype, int(chunk_size), num_segments)
    choice = choose(OP, shapes, implementation)
    arrays = (q, k, v, beta, g, initial_state, segment_ids)
    if choice.reference:
        return _by_tokens(scale, dtype, num_segments, *arrays)
    plan = LogDecayPlan(shapes.chunk, scale, choice.interpret)
    return _by_chunks(choice, plan, dtype, num_segments, *arrays)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _by_tokens(scale, dtype, num_segments, q, k, v, beta, g, initial_state, segment_ids):
    dtype = accumulator(dtype)
    state = _state(q, v, initial_state, num_segments, dtype)
    tokens = (None if x is None else x.astype(dtype) for x in (q, k, v, beta, g))
    out, state = gated_delta_rule_reference(*tokens, state, segment_ids, scale=scale, num_segments=num_segments)
    return out.astype(v.dtype), state


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _by_chunks(choice, plan, dtype, num_segments, q, k, v, beta, g, initial_state, segment_ids):
    """The chunkwise form: segments become gates or a layout, and T a multiple of the chunk."""
    sums = accumulator(dtype)
    state = _state(q, v, initial_state, num_segments, sums)
    if g is None and segment_ids is not None and num_segments is None:
        g = jnp.zeros(v.shape[:3], sums)
    g = None if g is None else g.astype(sums)
    tokens = (*(x.astype(dtype) for x in (q, k, v)), beta.astype(sums))
    tokens, g, layout = lay_out(tokens, g, segment_ids, num_segments, plan.chunk)
    decay = None if g is None else chunk_decay(g, plan.chunk, segments=segment_ids is not None)
    out, state = choice.run(plan, DeltaInputs(*tokens, decay, state, layout))
    return take_back(out, q.shape[1], segment_ids, layout).astype(v.dtype), state


def _state(q, v, initial_state, num_segments, dtype):
    if initial_state is not None:
        return initial_state.astype(dtype)
    segments = () if num_segments is None else (num_segments,)
    return jnp.zeros((q.shape[0], *segments, v.shape[2], q.shape[3], v.shape[3]), dtype)
