"""Polynomial features of keys and queries (ATLAS, arXiv 2505.23735): a matrix memory of them holds O(K^p) pairs."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def feature_count(width: int, degree: int) -> int:
    """Returns how many monomials of degree 1 to `degree` there are in `width` variables."""
    return sum(math.comb(width + d - 1, d) for d in range(1, degree + 1))


def polynomial_features(x: Float[Array, "*B K"], coefficients: Float[Array, " P"]) -> Float[Array, "*B F"]:
    """Returns all monomials of x of degrees 1 to P, so that phi(q) . phi(k) = sum_d (c_d)^2 (q . k)^d.

    A monomial that d! / prod(n_i!) orderings of its factors give carries the root of that number.
    """
    width, found = x.shape[-1], []
    for degree in range(1, coefficients.shape[0] + 1):
        index = list(itertools.combinations_with_replacement(range(width), degree))
        counts = [math.factorial(degree) / math.prod(math.factorial(i.count(n)) for n in set(i)) for i in index]
        monomials = jnp.prod(x[..., np.asarray(index)], axis=-1)
        found.append(coefficients[degree - 1] * monomials * jnp.asarray(np.sqrt(counts), x.dtype))
    return jnp.concatenate(found, axis=-1)
