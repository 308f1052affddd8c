"""The energy that retrieval descends."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from engrax.pallas_kernels.hopfield_retrieval.separation import conjugate
from engrax.pallas_kernels.hopfield_retrieval.similarity import half_square, similarities

WITH_ENERGY = ("dot", "l2")  # similarities under which an update is a step of descent


def energy(
    separation: str,
    alpha: float,
    similarity: str,
    state: Float[Array, "B H N D"],
    stored: Float[Array, "B H M D"],
    beta: Float[Array, " H"],
    visible: Bool[Array, "B _ M"] | None,
) -> Float[Array, "B H N"]:
    """Returns the energy of every state; all arrays in the dtype of the computation."""
    visible = None if visible is None else visible[:, None]
    scores = similarities(similarity, state, stored, state.dtype)
    if similarity == "l2":
        scores = scores - half_square(state)[..., None]
    zero = beta == 0
    beta_H11 = jnp.where(zero, 1, beta)[:, None, None]
    pull = conjugate(separation, alpha, beta_H11 * scores, visible) / beta_H11[..., 0]
    pull = jnp.where(zero[:, None], _mean(scores, visible), pull)
    return (half_square(state) if similarity == "dot" else 0) - pull


def _mean(scores, visible):
    """The limit for beta -> 0."""
    if visible is None:
        return jnp.mean(scores, axis=-1)
    count = jnp.maximum(jnp.sum(visible, axis=-1), 1).astype(scores.dtype)
    return jnp.sum(jnp.where(visible, scores, 0), axis=-1) / count
