"""Packed rows: helpers for mixers at the boundaries of segments.

`segment_ids [B, T]` are int32 and non-decreasing over the real tokens of a row. They are -1 on padding, which follows a
row's last token, and -2 on the packer's filler (see `engrax.pallas_kernels.common.segments`). A mixer's state has
`last_segment [B]`, the id of the row's last real token (-1: none yet), so a cut exactly at a boundary also resets.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from engrax.layers.common import sequence


def first_real_segment(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The id of each row's first real token, -1 for a row without one."""
    first = jnp.argmax(segment_ids >= 0, axis=1)
    return jnp.maximum(jnp.take_along_axis(segment_ids, first[:, None], axis=1)[:, 0], -1)


def first_segment_of_row(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """`first_real_segment` of rows that may be split over devices."""
    first = first_real_segment(segment_ids)
    if not sequence.is_split():
        return first
    none = jnp.iinfo(first.dtype).max
    lowest = sequence.row_min(jnp.where(first < 0, none, first))
    return jnp.where(lowest == none, -1, lowest)


def starts_anew(last_segment: Int[Array, " B"], segment_ids: Int[Array, "B T"]) -> Bool[Array, " B"]:
    """True for rows whose first real token belongs to another segment than the state."""
    first = first_segment_of_row(segment_ids)
    return (last_segment >= 0) & (first >= 0) & (first != last_segment)


def last_segment_after(last_segment: Int[Array, " B"], segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """The id of the last real token seen so far."""
    return jnp.maximum(last_segment, sequence.row_max(segment_ids.max(axis=1)))  # ids do not decrease, padding is -1


def newest(
    joined: Shaped[Array, "B _ *D"], width: int, lengths: Int[Array, " B"] | None
) -> Shaped[Array, "B width *D"]:
    """The newest `width` entries of rows with `width` older entries, followed by the T of a call.

    lengths: the number of valid entries of the T in each row (`row_lengths`); None: all.
    """
    if lengths is None:
        return joined[:, joined.shape[1] - width :]
    return jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, width, axis=0))(joined, lengths)


def select_rows(rows: Bool[Array, " B"], when_true, when_false):
    """`jnp.where` over the rows of two pytrees whose leaves are `[B, ...]`."""

    def pick(a, b):
        return jnp.where(rows.reshape((-1,) + (1,) * (b.ndim - 1)), a, b)

    return jax.tree.map(pick, when_true, when_false)
