"""The coefficients of the dual form: how the gates combine earlier states and writes into each token's memory.

Inside a block, with L_a[t,s] = prod_{j=s+1..t} a_j for t >= s, the memory after token t is

    W_t = A_t W_0 + B_t S_0 - sum_{i<=t} C[t,i] x_i^T delta_i
    S_t = P_t S_0           - sum_{i<=t} E[t,i] x_i^T delta_i

    E = L_momentum diag(lr),      P_t = prod_{j<=t} momentum_j,
    C = L_(1-forget) E,           A_t = prod_{j<=t} (1 - forget_j),      B = L_(1-forget) P,

where x_i^T delta_i is token i's gradient. W_0, S_0 are the block's initial state or, for tokens whose segment began
inside the block, the reset state. The last axis of `A` and the others selects it (0: carried, 1: reset). Products are
cumulative products of the gates themselves, so gates of exactly 0 or 1 give exact values and gradients.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


class Coefficients(NamedTuple):
    """Coefficients of all blocks. R is 1, or 2 if tokens may belong to a segment that starts from the reset state.

    anchor: factor of the anchor (or of the reset weights) in each token's gradient; None: exactly 1.
    read_weights, read_momentum, write: A, B and C above, for every token.
    last_*: A, B, C, P and E of the block's last slot, which give the next block's weights and momentum.
    """

    anchor: Float[Array, "*N S R"] | None
    read_weights: Float[Array, "*N S R"]
    read_momentum: Float[Array, "*N S R"]
    write: Float[Array, "*N S S"]
    last_momentum: Float[Array, "*N R"]
    last_write: Float[Array, "*N S"]


def _products(a: Float[Array, "*N S"], mask: Bool[Array, "*#N S S"]) -> Float[Array, "*N S S"]:
    """Returns L_a, with zeros where `mask` is False."""
    later = jnp.tri(a.shape[-1], k=-1, dtype=bool)
    return jnp.where(mask, lax.cumprod(jnp.where(later, a[..., :, None], 1), axis=a.ndim - 1), 0)


def coefficients(
    lr: Float[Array, "*N S"],
    momentum: Float[Array, "*N S"],
    forget: Float[Array, "*N S"],
    real: Bool[Array, "*#N S"],
    start: Bool[Array, "*#N S"] | None,
    gradient_at: str,
) -> Coefficients:
    """Returns the coefficients of the dual form.

    real: False for padding and empty slots, which have no effect.
    start: True for tokens that begin a segment from the reset state; None: no such token.
    """
    slots = lr.shape[-1]
    keep = jnp.where(real, 1 - forget, 1)
    momentum = jnp.where(real, momentum, 1)
    lr = jnp.where(real, lr, 0)
    mask, first = jnp.tri(slots, dtype=bool), jnp.arange(slots) == 0
    if start is not None:
        started = jnp.cumsum(start, axis=-1)
        mask = mask & (started[..., :, None] == started[..., None, :])
        first = first | start

    def since_start(l, a):  # the product of a from the segment's or the block's start to the token
        if start is None:
            return l[..., :, 0] * a[..., :1]
        return jnp.sum(l * jnp.where(first, a, 0)[..., None, :], axis=-1)

    l_keep, l_momentum = _products(keep, mask), _products(momentum, mask)
    a, p, e = since_start(l_keep, keep), since_start(l_momentum, momentum), l_momentum * lr[..., None, :]
    l_keep = jnp.where(real[..., None, :], l_keep, 0)  # padding adds no momentum to the weights
    b = jnp.sum(l_keep * p[..., None, :], axis=-1)
    c = jnp.matmul(l_keep, e, precision=lax.Precision.HIGHEST)
    at = keep if gradient_at == "decayed" else None

    def by_base(x):  # splits along a last axis: carried state, reset state
        if start is None:
            return x[..., None]
        return jnp.stack([jnp.where(started == 0, x, 0), jnp.where(started == 0, 0, x)], axis=-1)

    if start is not None or at is not None:
        at = by_base(jnp.ones_like(lr) if at is None else at)
    return Coefficients(at, by_base(a), by_base(b), c, by_base(p)[..., -1, :], e[..., -1, :])
