"""Similarities of a state xi and a stored pattern x (arXiv 2202.04557); higher means nearer:

dot      x . xi                                     l2   -1/2 |x - xi|^2
cosine   x . xi / (|x| |xi|)                        l1   -sum_d |x_d - xi_d|
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.matmul import Operands, accumulator, precision, rounded

SIMILARITIES = ("dot", "cosine", "l2", "l1")
SHORTEST = 1e-6  # minimum norm of a vector in the cosine; a zero vector has similarity 0


def product(axes: str, a: Float[Array, "..."], b: Float[Array, "..."], operands: Operands) -> Float[Array, "..."]:
    """Returns the einsum of two arrays as operands, in the accumulator's dtype."""
    a, b = rounded(a, operands), rounded(b, operands)
    return jnp.einsum(axes, a, b, precision=precision(a), preferred_element_type=accumulator(a.dtype))


def similarities(
    similarity: str, state: Float[Array, "B H N D"], stored: Float[Array, "B H M D"], operands: Operands
) -> Float[Array, "B H N M"]:
    """Returns the similarity of every state and pattern. "l2" omits the state's own term -1/2 |xi|^2: it is equal for
    all patterns, and separations ignore such terms."""
    if similarity == "l1":
        return _minus_l1(state, stored)
    if similarity == "cosine":
        state, stored = _unit(state), _unit(stored)
    scores = product("bhnd,bhmd->bhnm", state, stored, operands)
    return scores - half_square(stored)[:, :, None] if similarity == "l2" else scores


def half_square(x: Float[Array, "*B D"]) -> Float[Array, "*B"]:
    """Returns 1/2 |x|^2 in the accumulator's dtype."""
    x = x.astype(accumulator(x.dtype))
    return 0.5 * jnp.sum(x * x, axis=-1)


def _unit(x):
    x = x.astype(accumulator(x.dtype))
    return x * lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + SHORTEST**2)


def _minus_l1(state, stored):
    """Works on one feature at a time: all differences at once would be D times as large as the scores."""

    @jax.checkpoint
    def add(total, feature):
        x, y = feature
        return total - jnp.abs(x[..., :, None] - y[..., None, :]), None

    dtype = accumulator(state.dtype)
    features = tuple(jnp.moveaxis(x.astype(dtype), -1, 0) for x in (state, stored))
    return lax.scan(add, jnp.zeros((*state.shape[:3], stored.shape[2]), dtype), features)[0]
