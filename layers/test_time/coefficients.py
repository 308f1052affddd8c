"""Coefficients of each token's memory, computed from the gates: the general form of `neural_memory`'s coefficients.

Inside a block, with L_a[t,s] = prod_{j=s+1..t} a_j for t >= s, n orders of momentum and a window of c tokens,

    S^0_t = -lr_t sum_{i=t-c+1..t} weight_i grad_i                (c = 1: -lr_t grad_t)
    S^m_t = momentum^m_t S^m_{t-1} + S^{m-1}_t                    (m = 1..n)
    W_t   = (1 - forget_t) W_{t-1} + S^n_t

are sums of the block's initial state (or the reset state, if the token's segment starts inside the block) and of the
gradients grad_i = x_i^T delta_i. Products are cumulative products of the gates, so gates of 0 and 1 are exact.

Letters: S slots of the block; E gradients: the window's c - 1 earlier tokens, then the slots; R bases (carried state,
reset state); C channels of the forget gate, 1 or K; M orders of momentum.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


class Gates(NamedTuple):
    """Gates of a call `[B, T, H, ...]`, or of one head in one block `[S, ...]`."""

    lr: Float[Array, "*B"]
    momentum: Float[Array, "*B M"]
    forget: Float[Array, "*B C"]
    delta: Float[Array, "*B"]  # threshold of the Huber loss
    weight: Float[Array, "*B"]  # of the token's gradient in the windows that hold it


class Sums(NamedTuple):
    """A memory as a sum: of the bases' weights and momenta, minus the gradients times `write`."""

    weights: Float[Array, "*S R C"]
    momenta: Float[Array, "*S M R C"]
    write: Float[Array, "*S E C"]


class Coefficients(NamedTuple):
    """Coefficients of one block: the anchor of every gradient, the memory read by every slot, and the final state.

    last_momenta: the terms of S^m for every order m: factors of the bases' momenta `[M R]` and of the gradients `[E]`.
    segment: number of segments that start in the block up to and including the slot.
    """

    anchor: Float[Array, "E R C"] | None  # None: the one base itself
    read: Sums
    last: Sums
    last_momenta: tuple[tuple[Float[Array, "M R"], Float[Array, " E"]], ...]
    segment: Int[Array, " S"]


def _products(a: Float[Array, "S C"], mask: Bool[Array, "S S"]) -> Float[Array, "S S C"]:
    later = jnp.tri(a.shape[0], k=-1, dtype=bool)[..., None]
    return jnp.where(mask[..., None], lax.cumprod(jnp.where(later, a[:, None], 1), axis=0), 0)


def _window(lr, weight, real, segment, tail_weight, window: int) -> Float[Array, "S E"]:
    """Returns the weight of every gradient in each slot's step."""
    if window == 1:
        return jnp.diag(lr)
    earlier = window - 1
    count = jnp.cumsum(real)
    place = jnp.concatenate([jnp.arange(earlier) - earlier + 1, count])
    of = jnp.concatenate([jnp.zeros(earlier, segment.dtype), segment])
    age = count[:, None] - place[None]
    seen = (age >= 0) & (age < window) & (segment[:, None] == of[None])
    return lr[:, None] * jnp.where(seen, jnp.concatenate([jnp.maximum(tail_weight, 0), jnp.where(real, weight, 0)]), 0)


def coefficients(
    gates: Gates,
    real: Bool[Array, " S"],
    start: Bool[Array, " S"] | None,
    tail_weight: Float[Array, " _"],
    *,
    window: int,
    decayed: bool,
    read_first: bool,
) -> Coefficients:
    """Returns the coefficients of one head in one block.

    real: False for padding and empty slots, which change nothing; start: True where a segment begins (None: nowhere);
    decayed: gradients are taken at (1 - forget) times the anchor; read_first: a token reads before its own write.
    """
    slots, orders = real.shape[0], gates.momentum.shape[-1]
    keep, lr = jnp.where(real[:, None], 1 - gates.forget, 1), jnp.where(real, gates.lr, 0)
    segment = jnp.zeros(slots, jnp.int32) if start is None else jnp.cumsum(start, dtype=jnp.int32)
    mask = jnp.tri(slots, dtype=bool) & (segment[:, None] == segment[None])
    first = (jnp.arange(slots) == 0) | (False if start is None else start)

    def since_start(l, a):  # the product of a from the token's segment start, or the block's, to the token
        return jnp.einsum("tsc,sc->tc", l, jnp.where(first[:, None], a, 0), precision=lax.Precision.HIGHEST)

    def of_real(l):  # padding adds nothing to what comes after it
        return jnp.where(real[:, None], l, 0)

    def by_base(x):  # [S, ...] to [S, R, ...]
        carried = (segment == 0).reshape(-1, *[1] * (x.ndim - 1))
        return x[:, None] if start is None else jnp.stack([jnp.where(carried, x, 0), jnp.where(carried, 0, x)], axis=1)

    write = _window(lr, gates.weight, real, segment, tail_weight, window)
    held, last_momenta = [], []  # held: what S^m is made of, by order of the base's momentum, [S] each
    for m in range(orders):
        momentum = jnp.where(real, gates.momentum[:, m], 1)[:, None]
        l = _products(momentum, mask)
        added = of_real(l)[..., 0]
        product = partial(jnp.matmul, added, precision=lax.Precision.HIGHEST)
        held = [product(p) for p in held] + [since_start(l, momentum)[:, 0]]
        write = product(write)
        parts = [by_base(p)[-1] for p in held] + [jnp.zeros_like(by_base(lr)[-1])] * (orders - m - 1)
        last_momenta.append((jnp.stack(parts), write[-1]))
    l = _products(keep, mask)
    a = since_start(l, keep)
    c = jnp.einsum("tsc,se->tec", of_real(l), write, precision=lax.Precision.HIGHEST)
    b = jnp.zeros((slots, 0, keep.shape[-1]), keep.dtype)
    if orders:
        b = jnp.einsum("tsc,ms->tmc", of_real(l), jnp.stack(held), precision=lax.Precision.HIGHEST)
    after = Sums(by_base(a), jnp.swapaxes(by_base(b), 1, 2), c)
    if read_first:
        a, b, c = (_before(x, first, fill) for x, fill in ((a, 1), (b, 0), (c, 0)))
    read = Sums(by_base(a), jnp.swapaxes(by_base(b), 1, 2), c)
    last = Sums(*(x[-1] for x in after))
    return Coefficients(_anchor(by_base, keep, window, decayed), read, last, tuple(last_momenta), segment)


def _before(x, first, fill):
    """Returns the values one slot earlier, `fill` at the start of a block or segment."""
    return jnp.where(first.reshape(-1, *[1] * (x.ndim - 1)), fill, jnp.roll(x, 1, axis=0))


def _anchor(by_base, keep, window: int, decayed: bool):
    at = by_base(keep if decayed else jnp.ones_like(keep[:, :1]))
    if at.shape[1] == 1 and not decayed:
        return None
    carried = jnp.zeros((window - 1, *at.shape[1:]), at.dtype).at[:, 0].set(1)  # earlier tokens: the carried state's
    return jnp.concatenate([carried, at])
