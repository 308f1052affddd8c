"""The energy that retrieval descends."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from engrax.pallas_kernels.hopfield_retrieval.separation import conjugate
from engrax.pallas_kernels.hopfield_retrieval.similarity import half_square, similarities

WITH_ENERGY = ("dot", "l2")  # similarities for which an update is a descent step


def pull(
    separation: str,
    alpha: float,
    similarity: str,
    state: Float[Array, "B H N D"],
    stored: Float[Array, "B H M D"],
    beta: Float[Array, " H"],
    visible: Bool[Array, "_ _ M"] | None,
) -> Float[Array, "B H N"]:
    """Returns (Omega*(beta sim) - Omega*(0)) / beta of every state; all arrays in the dtype of the computation."""
    visible = None if visible is None else visible[:, None]
    scores = similarities(similarity, state, stored, state.dtype)
    if similarity == "l2":
        scores = scores - half_square(state)[..., None]
    zero = beta == 0
    beta_H11 = jnp.where(zero, 1, beta)[:, None, None]
    found = conjugate(separation, alpha, beta_H11 * scores, visible) / beta_H11[..., 0]
    at_zero = jnp.where(zero[:, None, None], scores, 0)
    return jnp.where(zero[:, None], _near_zero(alpha, at_zero, beta[:, None], visible), found)


def _near_zero(alpha, scores, beta, visible):
    """The first two terms in beta: the mean, and beta / 2 M^(alpha - 1) times the variance, which gives the slope
    in beta. (M^(alpha - 1) (I - 1/M) is the Jacobian of the separation at M equal scores.)"""
    shown = jnp.ones(scores.shape, bool) if visible is None else jnp.broadcast_to(visible, scores.shape)
    count = jnp.maximum(jnp.sum(shown, axis=-1), 1).astype(scores.dtype)
    mean = jnp.sum(jnp.where(shown, scores, 0), axis=-1) / count
    variance = jnp.sum(jnp.where(shown, scores - mean[..., None], 0) ** 2, axis=-1) / count
    return mean + 0.5 * beta * count ** (alpha - 1) * variance
