"""Log decays: products of gates as differences of a cumulative sum, without cancellation.

The product of the gates between two tokens is exp(G_i - G_j), where G is the cumulative sum of log gates inside a
chunk. In float32, this difference loses all digits if gates of -50 and of -1e-4 are mixed. So every gate is split into
a multiple of 2^-7, whose sums are exact, and a small rest:

    g = round(2^7 g) / 2^7 + rest,    hi = cumsum(multiples),    lo = cumsum(rests)
    G_i - G_j = (hi_i - hi_j) + (lo_i - lo_j)

The first difference is exact, and the second is between small numbers. So the result is as accurate as summing the
gates between the tokens one by one. A gate of -inf needs no special case: gates are clamped to a floor whose
exponential is exactly zero, and the clamp gives no gradient.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.matmul import COLUMNS, Operands, dot

FLOOR = -750.0  # exp(FLOOR) is exactly 0 in float64
FLOOR_32 = -110.0  # the same in float32; up to 1191 of these in one chunk add up exactly
STEP = 2.0**-7
DIRECT = 16  # tokens


class Decay(NamedTuple):
    """The cumulative sum hi + lo of the log gates of a chunk, up to and including each token.

    hi has no gradient. The gradient with respect to the sum is the cotangent of lo.
    """

    hi: Float[Array, "..."]
    lo: Float[Array, "..."]


def cumulative_decay(g: Float[Array, "..."], axis: int, *, segments: bool = False) -> Decay:
    """Returns the cumulative sums of log gates (float32 or float64) along the axis of the tokens of one chunk.

    segments: gates at the floor are boundaries that nothing passes, so `lo` restarts there. Rounding errors of
    gradients do not pass them either.
    """
    floor = FLOOR if g.dtype == jnp.float64 else FLOOR_32
    boundary, g = g <= floor, jnp.maximum(g, floor)
    whole = lax.stop_gradient(jnp.round(g / STEP) * STEP)
    lo = _sum_since(boundary, g - whole, axis) if segments else jnp.cumsum(g - whole, axis)
    return Decay(lax.stop_gradient(jnp.cumsum(whole, axis)), lo)


def _sum_since(boundary, x, axis: int):
    """Returns the cumulative sum of x, restarted at every boundary; doubling avoids any subtraction."""
    x, segment = jnp.moveaxis(x, axis, 0), jnp.cumsum(jnp.moveaxis(boundary, axis, 0), axis=0, dtype=jnp.int32)
    shift = 1
    while shift < x.shape[0]:
        earlier = jnp.where(segment[shift:] == segment[:-shift], x[:-shift], 0)
        x = x + jnp.pad(earlier, [(shift, 0)] + [(0, 0)] * (x.ndim - 1))
        shift *= 2
    return jnp.moveaxis(x, 0, axis)


def chunk_decay(g: Float[Array, "B T *D"], chunk: int, *, segments: bool = False) -> Decay:
    """Returns the cumulative sums inside every chunk of `chunk` tokens, laid out as g; T is a multiple of `chunk`."""
    chunks = g.reshape(g.shape[0], g.shape[1] // chunk, chunk, *g.shape[2:])
    hi, lo = cumulative_decay(chunks, 2, segments=segments)
    return Decay(hi.reshape(g.shape), lo.reshape(g.shape))


def difference(a: Decay, b: Decay) -> Float[Array, "..."]:
    """Returns a - b, the sum of the gates after b's token up to a's."""
    return (a.hi - b.hi) + (a.lo - b.lo)


def channel_scores(
    queries: tuple[Float[Array, "C K"], ...], k: Float[Array, "C K"], decay: Decay, operands: Operands
) -> tuple[Float[Array, "C C"], ...]:
    """Returns, per set of queries, sum_c q[i, c] k[j, c] exp(G[i, c] - G[j, c]) for j <= i, and 0 for j > i.

    The chunk is halved repeatedly. Between the left and the right half of a block, the decay factors around the left
    half's last token into exp(G_i - G_last) and exp(G_last - G_j), both at most 1. So no gate overflows, and all but
    the diagonal is matrix products. Blocks of up to `DIRECT` tokens use one DIRECT x DIRECT product per halving and
    mask out unwanted blocks, because smaller products are inefficient.
    """
    tokens = k.shape[0]
    size = 1 << (tokens - 1).bit_length()
    base = min(size, DIRECT)

    def blocks(x):
        return jnp.pad(x, ((0, size - tokens), (0, 0)), mode="edge").reshape(size // base, base, -1)

    queries, k, decay = jax.tree.map(blocks, (queries, k, decay))
    scores = _direct_scores(queries, k, decay, operands)
    while base < size:
        queries, k, decay = jax.tree.map(partial(_pairs, base), (queries, k, decay))
        left, right, last = (jax.tree.map(part, decay) for part in (_left, _right, _last_of_left))
        shrink, fade = jnp.exp(difference(right, last)), jnp.exp(difference(last, left))
        corners = _products([_right(q) * shrink for q in queries], _left(k) * fade, operands)
        scores = [_join(s.reshape(-1, 2, base, base), corner) for s, corner in zip(scores, corners)]
        base *= 2
    return tuple(s[0, :tokens, :tokens] for s in scores)


def _direct_scores(queries, k, decay, operands):
    """The same inside blocks `[n, size, K]` of a power-of-two size: all halvings at once, as masked products."""
    blocks, size, _ = k.shape
    scores = [jnp.sum(q * k, axis=2)[:, :, None] * jnp.eye(size, dtype=k.dtype) for q in queries]
    if size == 1:
        return scores
    halves = [1 << n for n in range(size.bit_length() - 1)]  # per halving: tokens in a half
    i, half = np.arange(size), np.array(halves)[:, None]
    is_right = (i % (2 * half) >= half)[:, :, None]
    same = i[:, None] // (2 * half[:, None]) == i[None, :] // (2 * half[:, None])  # in the same block

    def at_last(x):  # per halving and token: the last token of its block's left half
        return jnp.stack([jnp.repeat(x[:, half - 1 :: 2 * half], 2 * half, axis=1) for half in halves], axis=1)

    def per_halving(x, mask):  # [n, size, K] -> [n * halvings, size, K]
        return jnp.where(mask, x[:, None] * factor, 0).reshape(-1, *x.shape[1:])

    distance = difference(jax.tree.map(lambda x: x[:, None], decay), jax.tree.map(at_last, decay))
    factor = jnp.exp(jnp.where(is_right, distance, -distance))
    products = _products([per_halving(q, is_right) for q in queries], per_halving(k, ~is_right), operands)
    products = [product.reshape(blocks, -1, size, size) for product in products]
    return [s + jnp.sum(jnp.where(same, product, 0), axis=1) for s, product in zip(scores, products)]


def _products(queries, k, operands):
    """Returns q k^T for each of the queries, in one product; maps over the leading axis of all arrays."""
    multiply = jax.vmap(partial(dot, axis_a=COLUMNS, axis_b=COLUMNS, operands=operands))
    return jnp.split(multiply(jnp.concatenate(queries, axis=1), k), len(queries), axis=1)


def _pairs(size, x):
    """Returns blocks of `size` tokens in pairs, `[n, 2, size, K]`: the left and right halves of blocks of 2 size."""
    return x.reshape(-1, 2, size, x.shape[-1])


def _left(pairs):
    return pairs[:, 0]


def _right(pairs):
    return pairs[:, 1]


def _last_of_left(pairs):
    return pairs[:, 0, -1:]


def _join(halves, corner):
    """Returns blocks of twice the size, from the pairs of blocks on the diagonal and the blocks below it."""
    upper = jnp.concatenate([halves[:, 0], jnp.zeros_like(corner)], axis=2)
    return jnp.concatenate([upper, jnp.concatenate([corner, halves[:, 1]], axis=2)], axis=1)
