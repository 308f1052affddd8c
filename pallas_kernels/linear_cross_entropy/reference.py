"""The cross entropy of a linear head as it is defined, logits and all. The oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_cross_entropy_reference(
    hidden: Float[Array, "B T D"], embedding: Float[Array, "V D"], labels: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Returns the loss of every token, 0 where the label is -1; all arrays in the dtype of the computation."""
    logits = jnp.einsum("btd,vd->btv", hidden, embedding, precision=jax.lax.Precision.HIGHEST)
    at_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=2)[..., 0]
    return jnp.where(labels >= 0, jax.nn.logsumexp(logits, axis=2) - at_label, 0)
