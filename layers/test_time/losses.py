"""Inner losses of the memory, per token. Their derivative is the surprise."""

import jax.numpy as jnp
from jaxtyping import Array, Float

LOSSES = ("l2", "dot", "lp", "huber")


def inner_loss(
    kind: str, predicted: Float[Array, "S V"], v: Float[Array, "S V"], delta: Float[Array, " S"], power: float
) -> Float[Array, " S"]:
    """Returns the loss of every token.

    l2: 1/2 |M(k) - v|^2 (Titans, arXiv 2501.00663, appendix C); dot: -<M(k), v> (LaCT, arXiv 2505.23884);
    lp: 1/p |M(k) - v|_p^p (Moneta, arXiv 2504.13173; p = 2 is l2); huber: per coordinate e^2 / 2 where |e| <= delta,
    delta (|e| - delta / 2) elsewhere, delta per token (Yaad, same paper).
    """
    if kind == "dot":
        return -jnp.sum(predicted * v, axis=-1)
    error = predicted - v
    if kind == "l2":
        return 0.5 * jnp.sum(error * error, axis=-1)
    size = jnp.abs(error)
    if kind == "lp":
        return jnp.sum(size**power, axis=-1) / power
    delta = delta[:, None]
    near = jnp.minimum(size, delta)
    return jnp.sum(near * (size - 0.5 * near), axis=-1)
