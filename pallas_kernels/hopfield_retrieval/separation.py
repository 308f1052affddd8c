"""Separations, which turn scores into non-negative weights that sum to 1, and the conjugates of their entropies.

All are argmax_p <p, z> - Omega(p) over the simplex (arXiv 2411.08590): softmax with Omega = sum p log p, and
alpha-entmax (arXiv 1905.05702) with Omega = (sum p^alpha - 1) / (alpha (alpha - 1)). Sparsemax (arXiv 1602.02068) is
alpha = 2:

    p_i = [(alpha - 1) z_i - tau]_+ ^ (1 / (alpha - 1)),   tau such that sum p = 1

The weights of a row without visible patterns sum to 0, not 1.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

SEPARATIONS = ("softmax", "sparsemax", "entmax")


def separate(
    separation: str, alpha: float, scores: Float[Array, "*R M"], visible: Bool[Array, "..."] | None
) -> Float[Array, "*R M"]:
    """Returns the weights over the last axis; `visible` broadcasts against the scores; None: all are visible."""
    if separation == "softmax":
        exponential, total = exponentials(scores, visible)
        return exponential / total
    shown = _hide(scores, visible, 4 / (alpha - 1))
    weights = _sparsemax(shown) if separation == "sparsemax" else _entmax(alpha, shown)
    return weights if visible is None else jnp.where(visible, weights, 0)


def conjugate(
    separation: str, alpha: float, scores: Float[Array, "*R M"], visible: Bool[Array, "..."] | None
) -> Float[Array, "*R"]:
    """Returns Omega*(z) - Omega*(0) for the visible scores z, and 0 if none is visible. Its gradient is p.

    The difference vanishes with the scores, so dividing it by a small beta loses no digits.
    """
    shown = jnp.ones(scores.shape, bool) if visible is None else jnp.broadcast_to(visible, scores.shape)
    count = jnp.maximum(jnp.sum(shown, axis=-1), 1).astype(scores.dtype)
    top = jnp.max(jnp.where(shown, scores, -jnp.inf), axis=-1, keepdims=True)
    top = lax.stop_gradient(jnp.where(jnp.isfinite(top), top, 0))
    below = jnp.where(shown, scores - top, 0)
    if separation == "softmax":
        mean = jnp.sum(jnp.where(shown, jnp.exp(below), 0), axis=-1) / count
        rest = jnp.log(jnp.where(jnp.any(shown, axis=-1), mean, 1))
    else:
        p = lax.stop_gradient(separate(separation, alpha, scores, visible))  # by the envelope theorem, its change is 0
        entropy = (count ** (1 - alpha) - jnp.sum(p**alpha, axis=-1)) / (alpha * (alpha - 1))
        rest = jnp.where(jnp.any(shown, axis=-1), jnp.sum(p * below, axis=-1) + entropy, 0)
    return rest + top[..., 0]


def exponentials(
    scores: Float[Array, "*R M"], visible: Bool[Array, "..."] | None
) -> tuple[Float[Array, "*R M"], Float[Array, "*R 1"]]:
    """Returns softmax as (unnormalised weights, their divisor)."""
    scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
    top = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    # Guards for rows without visible patterns cost a third of an update on CPU: XLA recomputes sums for each divisor.
    exponential = jnp.exp(scores - (top if visible is None else jnp.where(jnp.isfinite(top), top, 0)))
    total = jnp.sum(exponential, axis=-1, keepdims=True)
    return exponential, total if visible is None else jnp.where(total > 0, total, 1)


def _hide(scores, visible, depth):
    """Moves hidden scores so far below the highest visible one that they get no weight; all stay finite."""
    if visible is None:
        return scores
    top = lax.stop_gradient(jnp.max(jnp.where(visible, scores, -jnp.inf), axis=-1, keepdims=True))
    top = jnp.where(jnp.isfinite(top), top, 0)
    return jnp.where(visible, scores, top - depth)


@jax.custom_jvp
def _sparsemax(scores):
    z = scores - jnp.max(scores, axis=-1, keepdims=True)
    falling = -jnp.sort(-z, axis=-1)
    total, k = jnp.cumsum(falling, axis=-1), jnp.arange(1, z.shape[-1] + 1)
    size = jnp.sum(1 + k * falling > total, axis=-1, keepdims=True)  # of the support
    tau = (jnp.take_along_axis(total, size - 1, axis=-1) - 1) / size.astype(z.dtype)
    return jnp.maximum(z - tau, 0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _entmax(alpha, scores):
    """Finds tau by bisection; it is between -1 and 0 if the highest score is 0."""
    z = (alpha - 1) * (scores - jnp.max(scores, axis=-1, keepdims=True))
    power = 1 / (alpha - 1)
    power = int(power) if power == int(power) else power

    def weights(tau):
        above = z - tau
        return jnp.where(above > 0, jnp.where(above > 0, above, 1) ** power, 0)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = jnp.sum(weights(middle), axis=-1, keepdims=True) >= 1
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.full((*z.shape[:-1], 1), -1, z.dtype)
    low, _ = lax.fori_loop(0, jnp.finfo(z.dtype).nmant + 2, halve, (low, jnp.zeros_like(low)))
    p = weights(low)
    return p / jnp.sum(p, axis=-1, keepdims=True)


def _tangent(p, slope, scores_dot):
    """dp = s (dz - <s, dz> / sum s) with s = p^(2 - alpha) on the support."""
    mean = jnp.sum(slope * scores_dot, axis=-1, keepdims=True) / jnp.sum(slope, axis=-1, keepdims=True)
    return p, slope * (scores_dot - mean)


@_sparsemax.defjvp
def _sparsemax_jvp(primals, tangents):
    p = _sparsemax(*primals)
    return _tangent(p, (p > 0).astype(p.dtype), *tangents)


@_entmax.defjvp
def _entmax_jvp(alpha, primals, tangents):
    p = _entmax(alpha, *primals)
    return _tangent(p, jnp.where(p > 0, jnp.where(p > 0, p, 1) ** (2 - alpha), 0), *tangents)
