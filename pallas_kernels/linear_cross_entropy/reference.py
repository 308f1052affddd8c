"""The cross entropy of a linear head by its definition, with all logits: the oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def linear_cross_entropy_reference(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    *,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """Returns (nats, correct, log of the sum) of every token, 0 where the label is -1; all arrays in the dtype of the
    computation."""
    logits = jnp.einsum("btd,vd->btv", hidden, embedding, precision=jax.lax.Precision.HIGHEST)
    logits = logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)
    at_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=2)[..., 0]
    real, log_total = labels >= 0, jax.nn.logsumexp(logits, axis=2)
    correct = real & (jnp.argmax(logits, axis=2) == labels)
    return jnp.where(real, log_total - at_label, 0), correct, jnp.where(real, log_total, 0)
