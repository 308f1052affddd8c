"""Segments packed into rows: gates for the simple form, and the layout that gives each segment its own state.

`segment_ids [B, T]` do not decrease along a row's real tokens. -1 is padding and -2 is filler: neither is written, and
both give 0. Padding after a row's last token does not count (`row_lengths`). Filler, and padding before a row's last
token, count in the row's chunk grid.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

PADDING, FILLER = -1, -2  # in segment_ids


def row_lengths(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Returns the number of positions that count in each row: up to its last token or filler; 0 if all is padding."""
    counts = jnp.arange(1, segment_ids.shape[1] + 1, dtype=jnp.int32)
    return jnp.max(jnp.where(segment_ids != PADDING, counts, 0), axis=1)


def segment_starts(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns True where a real token's segment differs from that of the real token before it."""
    real = segment_ids >= 0
    last = lax.cummax(jnp.where(real, jnp.arange(segment_ids.shape[1]), -1), axis=1)
    before = jnp.pad(last, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]  # the real token before, -1: none
    return real & (before >= 0) & (jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1) != segment_ids)


def mask_tokens(real: Bool[Array, "B T"], x: Shaped[Array, "B T *D"]) -> Shaped[Array, "B T *D"]:
    """Returns x with zeros at padding, which may hold any value, even NaN."""
    return jnp.where(real.reshape(real.shape + (1,) * (x.ndim - 2)), x, 0)


def segment_gates(g: Float[Array, "B T *D"], segment_ids: Int[Array, "B T"]) -> Float[Array, "B T *D"]:
    """Returns log gates that forget everything at segment starts and nothing at padding."""
    begins = segment_starts(segment_ids)
    begins = begins.reshape(begins.shape + (1,) * (g.ndim - 2))
    return mask_tokens(segment_ids >= 0, jnp.where(begins, -jnp.inf, g))


class SegmentLayout(NamedTuple):
    """Tokens laid out so that every segment begins at a chunk boundary.

    token: the token in every slot, T for empty slots. slot: the slot of every token, L for padding.
    segment: the segment of every chunk. first: True where a chunk is its segment's first.
    last_chunk: of every segment; has_tokens: False for segments without tokens (their last chunk is meaningless).
    """

    token: Int[Array, "B L"]
    slot: Int[Array, "B T"]
    segment: Int[Array, "B M"]
    first: Bool[Array, "B M"]
    last_chunk: Int[Array, "B N"]
    has_tokens: Bool[Array, "B N"]


def max_chunks(length: int, chunk: int, num_segments: int | None) -> int:
    """Returns the most chunks that `length` tokens can take in `num_segments` segments that each begin a chunk."""
    begun = 1 if num_segments is None else min(num_segments, length)
    return (length + begun * (chunk - 1)) // chunk


def aligned_layout(segment_ids: Int[Array, "B T"], num_segments: int, chunk: int) -> SegmentLayout:
    """Returns the layout of rows with segments 0 .. num_segments - 1.

    The number of chunks is static: the most that T tokens in that many segments can take. Chunks after a row's last
    segment are empty and count as its continuation.
    """
    batch, length = segment_ids.shape
    chunks = max_chunks(length, chunk, num_segments)
    real = segment_ids >= 0
    ids = jnp.where(real, segment_ids, num_segments)  # out of range: dropped by the counting
    count = jax.vmap(lambda row: jnp.zeros(num_segments, jnp.int32).at[row].add(1, mode="drop"))(ids)
    used = -(-count // chunk)
    end = jnp.cumsum(used, axis=1)  # the chunk after each segment's last chunk
    first_chunk = end - used
    tokens_before = jnp.cumsum(count, axis=1) - count
    own = jnp.minimum(ids, num_segments - 1)
    rank = jnp.cumsum(real, axis=1) - 1 - jnp.take_along_axis(tokens_before, own, axis=1)
    slot = jnp.where(real, jnp.take_along_axis(first_chunk, own, axis=1) * chunk + rank, chunks * chunk)
    token = jnp.full((batch, chunks * chunk), length, jnp.int32)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    token = jax.vmap(lambda row, i, t: row.at[i].set(t, mode="drop"))(token, slot, places)
    index = jnp.arange(chunks)
    segment = jnp.sum(index[None, :, None] >= end[:, None, :], axis=-1)  # segments that ended before the chunk
    segment = jnp.minimum(segment, num_segments - 1)
    has_tokens = count > 0
    starts = jnp.take_along_axis(first_chunk, segment, axis=1) == index
    first = starts & jnp.take_along_axis(has_tokens, segment, axis=1)
    return SegmentLayout(token, slot, segment, first, end - 1, has_tokens)


@jax.custom_vjp
def to_slots(x: Shaped[Array, "B T *D"], layout: SegmentLayout) -> Shaped[Array, "B L *D"]:
    """Lays out tokens in slots; empty slots hold zeros."""
    return _take(x, layout.token)


@jax.custom_vjp
def from_slots(x: Shaped[Array, "B L *D"], layout: SegmentLayout) -> Shaped[Array, "B T *D"]:
    """Returns the tokens in order; padding holds zeros."""
    return _take(x, layout.slot)


def _take(x, index):
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=0))(x, index)


# Each is the other's transpose, so neither direction needs a scatter.
to_slots.defvjp(lambda x, layout: (to_slots(x, layout), layout), lambda layout, y: (from_slots(y, layout), None))
from_slots.defvjp(lambda x, layout: (from_slots(x, layout), layout), lambda layout, y: (to_slots(y, layout), None))
