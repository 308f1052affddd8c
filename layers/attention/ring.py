"""Softmax attention to the earlier pieces of rows split over devices: keys and values travel around the ring.

In hop d, every device has the keys and values of the device d places before it, and merges the attention to them by the
log of the softmax's sum (arXiv 2310.01889). The backward pass sends them around again, with their cotangents, so no
device ever holds the keys of a whole row. With a window there are as many hops as it reaches back; a window shorter
than a piece needs one, of window - 1 tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers.common import sequence
from engrax.pallas_kernels.softmax_attention.api import softmax_attention_terms
from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs
from engrax.pallas_kernels.softmax_attention.xla import earlier_terms

NOBODY = -3  # the segment of keys that no query sees


class Ring(NamedTuple):
    """The static part of a call. size: tokens of a piece that travel, its last."""

    form: AttentionForm
    hops: int
    size: int
    axis: str


class Piece(NamedTuple):
    """What travels."""

    k: Float[Array, "B S G K"]
    v: Float[Array, "B S G K"]
    segment_ids: Int[Array, "B S"]


def attention_in_pieces(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T G K"],
    v: Float[Array, "B T G K"],
    segment_ids: Int[Array, "B T"],
    window: int | None,
    cache: tuple[Float[Array, "B C G K"], Float[Array, "B C G K"], Int[Array, "B C"]] | None,
) -> list[tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]]:
    """The parts of causal attention in rows split over devices, for `merge_attention`: to this piece, to the earlier
    pieces, and to the keys, values and segments of the `window` - 1 tokens before the row.

    Raises UserError for a cache without a window.
    """
    if cache is not None and window is None:
        raise UserError(
            "attention without a window cannot continue a cache on rows split by parallel.sequence; set a window."
        )
    parts = [softmax_attention_terms(q, k, v, window=window, segment_ids=segment_ids)]
    earlier = _to_earlier_pieces(q, k, v, segment_ids, window)
    parts += [] if earlier is None else [earlier]
    if cache is not None and window > 1:
        keys, values, segments = cache
        queries, cached = AttentionInputs(q, q, q, segment_ids), AttentionInputs(keys, keys, values, segments)
        form = AttentionForm(window, q.shape[-1] ** -0.5)
        parts.append(earlier_terms(form, window - 1 + sequence.index() * q.shape[1], queries, cached))
    return parts


def _to_earlier_pieces(q, k, v, segment_ids, window):
    """The attention to the earlier pieces of the row; None if the window never reaches there."""
    length, others = q.shape[1], sequence.count() - 1
    reach = others * length if window is None else window - 1
    hops = min(others, -(-reach // length))
    if hops == 0:
        return None
    size = min(reach, length) if hops == 1 else length
    form = AttentionForm(window, q.shape[-1] ** -0.5, log_sum=True)
    return _around(Ring(form, hops, size, sequence.axis()), q, k, v, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _around(ring, q, k, v, segment_ids):
    return _forward(ring, q, k, v, segment_ids)[0]


def _forward(ring, q, k, v, segment_ids):
    def hop(carry, distance):
        piece, out, log_sum = carry
        piece = sequence.moved(piece)
        part, part_sum = _attend(ring, distance, segment_ids, piece.segment_ids, q, piece.k, piece.v)
        both = jnp.logaddexp(log_sum, part_sum)
        out = out * jnp.exp(log_sum - both)[..., None] + part * jnp.exp(part_sum - both)[..., None]
        return (piece, out, both), None

    wide = jnp.promote_types(q.dtype, jnp.float32)
    nothing = jnp.full(q.shape[:3], -0.5 * jnp.finfo(wide).max, wide)
    start = _last(ring, k, v, segment_ids), jnp.zeros(q.shape, wide), nothing
    (_, out, log_sum), _ = lax.scan(hop, start, jnp.arange(1, ring.hops + 1))
    return (out.astype(q.dtype), log_sum), (q, k, v, segment_ids, out, log_sum)


def _backward(ring, saved, bars):
    q, k, v, segment_ids, out, log_sum = saved
    out_bar, sum_bar = bars
    out_bar = out_bar.astype(out.dtype)
    mean = jnp.sum(out_bar * out, axis=-1) - sum_bar

    def hop(carry, distance):
        piece, piece_bars, q_bar = carry
        piece, piece_bars = sequence.moved((piece, piece_bars))
        attend = partial(_attend, ring, distance, segment_ids, piece.segment_ids)
        (part, part_sum), pull = jax.vjp(attend, q, piece.k, piece.v)
        weight = jnp.exp(part_sum - log_sum)
        part_bar = (weight[..., None] * out_bar).astype(part.dtype)
        part_sum_bar = weight * (jnp.sum(out_bar * part, axis=-1) - mean)
        q_more, *more = pull((part_bar, part_sum_bar))
        return (piece, jax.tree.map(jnp.add, piece_bars, tuple(more)), q_bar + q_more), None

    with sequence.pieces(ring.axis):  # it is traced later than the forward pass
        piece = _last(ring, k, v, segment_ids)
        start = piece, (jnp.zeros_like(piece.k), jnp.zeros_like(piece.v)), jnp.zeros_like(q)
        (_, piece_bars, q_bar), _ = lax.scan(hop, start, jnp.arange(1, ring.hops + 1))
        home = sequence.moved(piece_bars, -ring.hops)
    rest = k.shape[1] - ring.size
    return q_bar, *(jnp.pad(x, ((0, 0), (rest, 0), (0, 0), (0, 0))) for x in home), None


_around.defvjp(_forward, _backward)


def _last(ring: Ring, *piece: Array) -> Piece:
    return Piece(*(x[:, x.shape[1] - ring.size :] for x in piece))


def _attend(ring: Ring, distance: Int[Array, ""], segment_ids, piece_ids, q, k, v):
    """The attention to a piece `distance` pieces before this one, to nothing if the ring has come around."""
    piece_ids = jnp.where(distance <= sequence.index(), piece_ids, NOBODY)
    before = (distance - 1) * q.shape[1] + ring.size
    queries, keys = AttentionInputs(q, q, q, segment_ids), AttentionInputs(k, k, v, piece_ids)
    return earlier_terms(ring.form, before, queries, keys)
