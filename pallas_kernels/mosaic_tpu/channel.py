"""Scores of one chunk under decay per channel, with two-dimensional arrays only, as TPU kernels need them."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay, difference
from engrax.pallas_kernels.common.matmul import COLUMNS, Operands, dot
from engrax.pallas_kernels.mosaic_tpu.parts import SUBLANES


def channel_scores(
    queries: tuple[Float[Array, "C K"], ...], k: Float[Array, "C K"], decay: Decay, operands: Operands
) -> tuple[Float[Array, "C C"], ...]:
    """Returns, per set of queries, sum_c q[i, c] k[j, c] exp(G[i, c] - G[j, c]) for j <= i, and 0 for j > i.

    As in `decay.channel_scores`, the chunk is halved repeatedly. Between the right and the left half of a block, the
    decay factors around the left half's last token into two exponentials of at most 1. Here each halving is one product
    of the whole chunk with itself, and a mask keeps the (right, left) pairs of its blocks. The last token cancels
    between the two factors, so its decay needs no cotangent.
    """
    size = k.shape[0]
    i, j = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    token = lax.broadcasted_iota(jnp.int32, k.shape, 0)
    scores = [jnp.where(i == j, jnp.sum(q * k, axis=1, keepdims=True), 0) for q in queries]
    for level in range((size - 1).bit_length()):  # blocks of two halves of 2^level tokens
        ends = Decay(*(lax.stop_gradient(_left_ends(x, 1 << level)) for x in decay))
        distance = difference(decay, ends)
        factor = jnp.exp(jnp.where((token >> level) & 1 == 1, distance, -distance))
        pairs = ((i >> level) & 1 == 1) & ((j >> level) == (i >> level) - 1)
        faded = k * factor
        scores = [
            jnp.where(pairs, dot(q * factor, faded, COLUMNS, COLUMNS, operands), s) for q, s in zip(queries, scores)
        ]
    return tuple(scores)


def _left_ends(x: Float[Array, "C K"], half: int) -> Float[Array, "C K"]:
    """Returns, for each token, the row of the last token in the left half of its block of 2 * half tokens."""
    size, features = x.shape
    if 2 * half >= SUBLANES:
        starts = range(0, size, 2 * half)
        ends = [(min(start + half, size) - 1, min(2 * half, size - start)) for start in starts]
        return jnp.concatenate([jnp.broadcast_to(x[end : end + 1], (count, features)) for end, count in ends])
    tiles = x.reshape(size // SUBLANES, SUBLANES, features)
    place = lax.broadcasted_iota(jnp.int32, tiles.shape, 1)
    out = jnp.broadcast_to(tiles[:, half - 1 : half], tiles.shape)
    for start in range(2 * half, SUBLANES, 2 * half):
        out = jnp.where(place >= start, tiles[:, start + half - 1 : start + half], out)
    return out.reshape(size, features)
