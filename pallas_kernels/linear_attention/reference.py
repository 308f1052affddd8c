"""Linear attention by its definition, token by token. A slow oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_attention_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T HV V"],
    g: Float[Array, "B T HV #K"],
    state: Float[Array, "B N HV K V"],
    segment_ids: Int[Array, "B T"],
    *,
    scale: float,
    carried: bool,
) -> tuple[Float[Array, "B T HV V"], Float[Array, "B N HV K V"]]:
    """Runs the recurrence token by token; all arrays in the dtype of the computation.

    carried: segment n has state n. Otherwise there is one state, and later segments start from zero.
    """
    groups = v.shape[2] // q.shape[2]
    q, k = (jnp.repeat(x, groups, axis=2) for x in (q, k))  # value head j reads query head j // groups
    rows = jnp.arange(q.shape[0])

    def token(carry, inputs):
        states, last_id = carry
        q_t, k_t, v_t, g_t, id_t = inputs
        real = id_t >= 0
        slot = jnp.maximum(id_t, 0) if carried else jnp.zeros_like(id_t)
        old = states[rows, slot]
        begins = real & (last_id >= 0) & (id_t != last_id) & (not carried)
        kept = jnp.where(begins[:, None, None, None], 0, jnp.exp(g_t)[..., None] * old)
        new = kept + k_t[..., :, None] * v_t[..., None, :]
        out = scale * jnp.einsum("bhk,bhkv->bhv", q_t, new)
        real_ = real[:, None, None]
        states = states.at[rows, slot].set(jnp.where(real_[..., None], new, old))
        return (states, jnp.where(real, id_t, last_id)), jnp.where(real_, out, 0)

    tokens = tuple(jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, segment_ids))
    start = jnp.full(q.shape[0], -1, segment_ids.dtype)
    (state, _), out = jax.lax.scan(token, (state, start), tokens)
    return jnp.moveaxis(out, 0, 1), state
