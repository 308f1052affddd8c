"""Conversion of the log-decay operations' arguments for the chunkwise form: dtypes, segments, padding."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

from engrax.pallas_kernels.common.log_decay import LogDecayShapes
from engrax.pallas_kernels.common.segments import (
    SegmentLayout,
    aligned_layout,
    from_slots,
    mask_tokens,
    max_chunks,
    segment_gates,
    to_slots,
)

AnyArray = Array | np.ndarray  # accepted from callers


def token_dtype(q: AnyArray, k: AnyArray, v: AnyArray, *others: AnyArray | None) -> np.dtype:
    """Returns the dtype of q, k and v in the computation: their common dtype, or float64 if any argument is float64."""
    dtype = jnp.result_type(q, k, v)
    others = [x for x in others if x is not None]
    is_double = others and jnp.result_type(*others) == jnp.float64
    return np.dtype(jnp.float64 if is_double else dtype)


def call_shapes(
    q: AnyArray, v: AnyArray, g: AnyArray | None, dtype: DTypeLike, chunk_size: int, num_segments: int | None
) -> LogDecayShapes:
    """Returns the sizes passed to a kernel."""
    batch, length, query_heads, key = q.shape
    chunk = min(length, chunk_size)
    chunks = max_chunks(length, chunk, num_segments)
    gate = "none" if g is None else ("scalar" if g.ndim == 3 else "channel")
    sizes = (batch, chunks * chunk, query_heads, v.shape[2], key, v.shape[3], chunk, np.dtype(dtype))
    return LogDecayShapes(*sizes, gate, num_segments or 0)


def lay_out(
    tokens: tuple[Float[Array, "B T ..."], ...],
    g: Float[Array, "B T *D"] | None,
    segment_ids: Int[Array, "B T"] | None,
    num_segments: int | None,
    chunk: int,
) -> tuple[tuple[Float[Array, "B L ..."], ...], Float[Array, "B L *D"] | None, SegmentLayout | None]:
    """Returns tokens, gates and layout, with L a multiple of the chunk; positions without a real token are zero.

    Segments without separate states become gates of -inf, so they require a `g`.
    """
    batch, length = tokens[0].shape[:2]
    if num_segments is not None:
        layout = aligned_layout(segment_ids, num_segments, chunk)
        return tuple(to_slots(x, layout) for x in tokens), None if g is None else to_slots(g, layout), layout
    if segment_ids is not None:
        tokens = tuple(mask_tokens(segment_ids >= 0, x) for x in tokens)
        g = segment_gates(g, segment_ids)
    missing = -length % chunk

    def pad(x):
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x

    return tuple(map(pad, tokens)), None if g is None else pad(g), None


def take_back(
    out: Float[Array, "B L HV V"], length: int, segment_ids: Int[Array, "B T"] | None, layout: SegmentLayout | None
) -> Float[Array, "B T HV V"]:
    """Returns the outputs of the call's tokens in order, with zeros at padding."""
    if layout is not None:
        return from_slots(out, layout)
    out = out[:, :length]
    return out if segment_ids is None else mask_tokens(segment_ids >= 0, out)
