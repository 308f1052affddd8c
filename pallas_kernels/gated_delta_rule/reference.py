"""The gated delta rule by its definition, token by token. A slow oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _token(state, q, k, v, beta, g, scale):
    """Returns (state, out) of one head after one token; g: `[]` or `[K]`, beta: `[]`."""
    decay = jnp.exp(g)
    state = (decay[:, None] if decay.ndim else decay) * state
    state = state + beta * jnp.outer(k, v - k @ state)
    return state, scale * (q @ state)


def gated_delta_rule_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    beta: Float[Array, "B T HV"],
    g: Float[Array, "B T HV *K"] | None,
    initial_state: Float[Array, "B *N HV K V"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    scale: float,
    num_segments: int | None,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B *N HV K V"]]:
    """Runs the recurrence of `gated_delta_rule` token by token; all arrays in the dtype of the computation."""
    batch, length, heads = v.shape[:3]
    q, k = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (q, k))
    g = jnp.zeros_like(beta) if g is None else g
    ids = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else segment_ids
    write = jax.vmap(jax.vmap(_token, in_axes=(0, 0, 0, 0, 0, 0, None)), in_axes=(0, 0, 0, 0, 0, 0, None))
    row = jnp.arange(batch)

    def by_row(condition, new, old):
        return jnp.where(condition.reshape(batch, *[1] * (new.ndim - 1)), new, old)

    def token(carry, inputs):
        states, last_id = carry
        *values, id_t = inputs
        real = id_t >= 0
        values = [by_row(real, x, 0) for x in values]  # padding may hold any value
        if num_segments is None:
            state = by_row(real & (last_id >= 0) & (id_t != last_id), jnp.zeros_like(states), states)
        else:
            state = states[row, jnp.maximum(id_t, 0)]
        written, out = write(state, *values, scale)
        state = by_row(real, written, state)
        states = state if num_segments is None else states.at[row, jnp.maximum(id_t, 0)].set(state)
        return (states, jnp.where(real, id_t, last_id)), by_row(real, out, 0)

    inputs = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, beta, g, ids))
    (states, _), out = jax.lax.scan(token, (initial_state, jnp.full(batch, -1, ids.dtype)), inputs)
    return jnp.moveaxis(out, 0, 1), states
