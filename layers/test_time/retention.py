"""Retention for memories that update at the ends of chunks, and Newton-Schulz.

Such a memory stores `stored`; keys and queries are multiplied by `effective(stored)`. At the end of a chunk
`retain(stored, keep, update)` returns the next `stored`; keep is the product of the chunk's (1 - forget).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

RETENTIONS = ("decay", "row_norm", "q_norm", "softmax")
Matrix = Float[Array, "I O"]
_TINY = 1e-12
_DAMPING = 1e-8  # of a squared norm: norms far below 1e-4 stay small, and so does the derivative at 0
# Quintic of Muon's Newton-Schulz iteration: it drives singular values from anywhere in (0, 1] to about 1.
_QUINTIC = (3.4445, -4.7750, 2.0315)


def effective(kind: str, stored: Matrix, power: float) -> Matrix:
    """Returns the matrix for reading.

    q_norm: A / |A|_q^(q-2) (Moneta, arXiv 2504.13173); softmax: every column (the input weights of one output) on the
    probability simplex (Memora, same paper, with its constant c = 1); else `stored`.
    """
    if kind == "q_norm":
        norm = (jnp.sum(jnp.abs(stored) ** power) + _TINY) ** (1 / power)
        return stored / norm ** (power - 2)
    if kind == "softmax":
        return jax.nn.softmax(stored, axis=0)
    return stored


def retain(kind: str, stored: Matrix, keep: Float[Array, ""], update: Matrix) -> Matrix:
    """Returns the stored matrix after a chunk.

    decay, q_norm: keep A + U; row_norm: the same with the input weights of every output rescaled to the norm they had
    (LaCT, arXiv 2505.23884); softmax: keep log W + U, the logits of the next W (KL retention, Memora).
    """
    if kind == "softmax":
        return keep * jax.nn.log_softmax(stored, axis=0) + update
    new = keep * stored + update
    if kind == "row_norm":
        squares = partial(jnp.sum, axis=0, keepdims=True)
        return new * jnp.sqrt((squares(stored * stored) + _TINY) / (squares(new * new) + _TINY))
    return new


def newton_schulz(g: Matrix, steps: int = 5) -> Matrix:
    """Returns about the orthogonal factor of g; 0 stays 0.

    Singular values above about 1/200 of the norm of g go to [0.6, 1.25]; smaller ones grow by up to 3.4 a step.
    """
    a, b, c = _QUINTIC
    x = g * lax.rsqrt(jnp.sum(g * g) + _DAMPING)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return x.T if tall else x
