"""Hopfield retrieval by its definition, one row, head and state at a time: the oracle.

The implicit gradient is that of one update at the fixed point xi*, times (I - J)^-1, with J its D x D Jacobian there:
d xi* = (I - J)^-1 (df / d theta) d theta.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from engrax.pallas_kernels.hopfield_retrieval.separation import separate
from engrax.pallas_kernels.hopfield_retrieval.similarity import SHORTEST
from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm

_SIMILARITY = {
    "dot": lambda x, xi: x @ xi,
    "cosine": lambda x, xi: x @ xi / jnp.sqrt((jnp.sum(x * x, axis=-1) + SHORTEST**2) * (xi @ xi + SHORTEST**2)),
    "l2": lambda x, xi: -0.5 * jnp.sum((x - xi) ** 2, axis=-1),
    "l1": lambda x, xi: -jnp.sum(jnp.abs(x - xi), axis=-1),
}


def hopfield_retrieval_reference(
    form: RetrievalForm,
    state: Float[Array, "B H N D"],
    stored: Float[Array, "B H M D"],
    values: Float[Array, "B H M V"],
    beta: Float[Array, " H"],
    visible: Bool[Array, "B N M"],
) -> Float[Array, "B H N V"]:
    """Returns the retrieved vector of every state; all arrays have the dtype of the computation."""

    def one(xi, x, v, b, seen):
        def weights(xi, x, b):
            return separate(form.separation, form.alpha, b * _SIMILARITY[form.similarity](x, xi), seen)

        def update(xi, x, b):
            return weights(xi, x, b) @ x

        return weights(_last_state(form, update, xi, x, b, seen), x, b) @ v

    over_states = jax.vmap(one, in_axes=(0, None, None, None, 0))
    over_heads = jax.vmap(over_states, in_axes=(0, 0, 0, 0, None))
    with jax.default_matmul_precision("highest"):
        return jax.vmap(over_heads, in_axes=(0, 0, 0, None, 0))(state, stored, values, beta, visible)


def _last_state(form: RetrievalForm, update, xi, x, b, seen):
    """The state before the last association."""
    if form.steps is not None:
        for _ in range(form.steps - 1):
            xi = update(xi, x, b)
        return xi
    furthest = form.tolerance * jnp.max(jnp.where(seen, jnp.linalg.norm(lax.stop_gradient(x), axis=-1), 0))

    def step(carry, _):
        xi, rests = carry
        new = update(xi, x, b)
        moved = jnp.linalg.norm(lax.stop_gradient(new - xi))
        return (jnp.where(rests, xi, new), rests | (moved <= furthest)), None

    (resting, _), _ = lax.scan(step, (xi, jnp.array(False)), length=form.max_steps - 1)
    if form.gradient == "unrolled":
        return resting
    resting = lax.stop_gradient(resting)
    here = update(resting, x, b)
    slope = jax.jacfwd(update)(resting, *lax.stop_gradient((x, b)))
    system = lax.stop_gradient(jnp.eye(len(resting), dtype=slope.dtype) - slope)
    return resting + jnp.linalg.solve(system, here - lax.stop_gradient(here))
