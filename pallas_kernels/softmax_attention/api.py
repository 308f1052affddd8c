"""The public operation `softmax_attention`: contract, validation and choice of an implementation."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.common.segments import mask_tokens
from engrax.pallas_kernels.common.validation import check_array, check_positive_int, check_rank, check_scale
from engrax.pallas_kernels.dispatch import choose
from engrax.pallas_kernels.softmax_attention.reference import softmax_attention_reference
from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs, AttentionShapes

OP = "softmax_attention"


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
def softmax_attention(q, k, v, *, window=None, segment_ids=None, scale=None, implementation=None):
    """Returns causal softmax attention within rows, the weighted means of the values that every query sees:

        out_t = sum_s w_ts v_s,   w_t = softmax_s(scale q_t . k_s),   s <= t in t's segment,  s > t - window

    A query sees itself and earlier tokens of its segment. Query head h reads head h // (H // G) of k and v.

    Args:
      q: queries `[B, T, H, K]`; float64, float32, bfloat16 or float16.
      k, v: keys and values `[B, T, G, K]`, G a divisor of H.
      window: tokens a query sees, itself included; None: all.
      segment_ids: int `[B, T]`, -1 = padding, -2 = filler: seen by no token of a segment, output 0. Equal ids of a row
        are one segment.
      scale: a number; None: K ** -0.5.
      implementation: None (choose), "reference" (all scores in memory), "xla" (in blocks), or a library's kernel, see
        `engrax.pallas_kernels.available`.

    Returns:
      out `[B, T, H, K]` in q's dtype.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that cannot serve this call here; the message says why.
    """
    return _call(q, k, v, window, segment_ids, scale, implementation, log_sum=False)[0]


@no_type_check
def softmax_attention_terms(q, k, v, *, window=None, segment_ids=None, scale=None, implementation=None):
    """Returns `softmax_attention`'s out and log sum_s exp(scale q_t . k_s) `[B, T, H]`, float32 (float64 if q is), by
    which it can be merged with an attention to other keys (`merge_attention`)."""
    return _call(q, k, v, window, segment_ids, scale, implementation, log_sum=True)


@no_type_check
def _call(q, k, v, window, segment_ids, scale, implementation, log_sum):
    check_rank("q", q, "[B, T, H, K]")
    check_rank("k", k, "[B, T, G, K]")
    check_array("q", q, "[B, T, H, K]", q.shape)
    for name, x in (("k", k), ("v", v)):
        check_array(name, x, "[B, T, G, K]", (*q.shape[:2], k.shape[2], q.shape[3]))
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"q has {q.shape[2]} heads, wanted a multiple of the {k.shape[2]} heads of k and v.")
    if window is not None:
        check_positive_int("window", window)
        window = int(window) if window < q.shape[1] else None
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "[B, T]", q.shape[:2], jnp.integer)
    dtype = jnp.result_type(q, k, v)
    segments = segment_ids is not None
    shapes = AttentionShapes(*q.shape[:3], *k.shape[2:], window, jnp.dtype(dtype), segments, log_sum)
    choice = choose(OP, shapes, implementation)
    form = AttentionForm(window, check_scale(scale, q.shape[3]), log_sum, choice.interpret)
    return _run(choice, form, q, k, v, segment_ids)


@partial(jax.jit, static_argnums=(0, 1))
def _run(choice, form, q, k, v, segment_ids):
    dtype = jnp.result_type(q, k, v)
    inputs = AttentionInputs(*(x.astype(dtype) for x in (q, k, v)), segment_ids)
    run = softmax_attention_reference if choice.reference else choice.run
    out, *log_sum = run(form, inputs)
    out = out.astype(q.dtype)
    return out if segment_ids is None else mask_tokens(segment_ids >= 0, out), *log_sum


def merge_attention(*parts):
    """Merges attentions of the same queries to different keys into the attention to all of them.

    parts: pairs (out `[B, T, H, V]`, log of the softmax's sum `[B, T, H]`). Returns out, in the first one's dtype.
    """
    outs, log_sums = zip(*parts)
    weights = jax.nn.softmax(jnp.stack(log_sums), axis=0)[..., None]
    return sum(weight * out for weight, out in zip(weights, outs)).astype(outs[0].dtype)
