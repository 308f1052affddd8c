"""Softmax attention by cuDNN, through `jax.nn.dot_product_attention`.

The public function takes neither segment ids nor the offsets of packed segments. Rows with segment ids are therefore
looked at when the program runs: cuDNN serves a batch in which no token has another segment before it, and the XLA form
any other batch.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from engrax.pallas_kernels.passes import Passes
from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs, AttentionShapes, Outputs
from engrax.pallas_kernels.softmax_attention.xla import softmax_attention_xla

MOST_KEY = 128  # channels of a head, forward and backward, on every architecture that cuDNN's attention serves


def unsupported(shapes: AttentionShapes) -> str | None:
    """Returns why cuDNN alone cannot serve a call, or None if it can."""
    if shapes.segments:
        return "jax.nn.dot_product_attention does not take the segments of a row"
    return _unsupported_sizes(shapes)


def unsupported_by_rows(shapes: AttentionShapes) -> str | None:
    """Returns why the choice between cuDNN and XLA by the rows' segments cannot serve a call, or None if it can."""
    if not shapes.segments:
        return "it serves rows with segment ids"
    return _unsupported_sizes(shapes)


def _unsupported_sizes(shapes: AttentionShapes) -> str | None:
    if shapes.dtype.itemsize != 2:
        return f"cuDNN's attention takes bfloat16 and float16, not {shapes.dtype}"
    if shapes.key % 8 or shapes.key > MOST_KEY:
        return f"cuDNN's attention takes heads of a multiple of 8 channels up to {MOST_KEY}, not {shapes.key}"
    if shapes.log_sum:
        return "cuDNN's log of the softmax's sum has no gradient and the tokens' precision"
    return None


@cache
def not_installed() -> str | None:
    """Returns why this process cannot trace a call of cuDNN, or None if it can."""
    x = jax.ShapeDtypeStruct((1, 8, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(partial(jax.nn.dot_product_attention, implementation="cudnn"), x, x, x)
    except RuntimeError as error:
        return f"JAX finds no cuDNN in this process ({error})"
    return None


def one_segment(segment_ids: Int[Array, "B T"]) -> Bool[Array, ""]:
    """Returns whether no token has another segment, filler or padding before it."""
    begun = jax.lax.cummin((segment_ids == segment_ids[:, :1]).astype(jnp.int32), axis=1) == 1
    return jnp.all(begun | (segment_ids < 0))


def _cudnn(form: AttentionForm, inputs: AttentionInputs) -> Outputs:
    window = None if form.window is None else (form.window - 1, 0)
    options = dict(scale=form.scale, is_causal=True, local_window_size=window, implementation="cudnn")
    return (jax.nn.dot_product_attention(*inputs[:3], **options),)


def _by_rows(form: AttentionForm, inputs: AttentionInputs) -> Outputs:
    whole, packed = (partial(f, form) for f in (_cudnn, softmax_attention_xla))
    return jax.lax.cond(one_segment(inputs.segment_ids), whole, packed, inputs)


passes = Passes.saving(_cudnn)
passes_by_rows = Passes.saving(_by_rows)
