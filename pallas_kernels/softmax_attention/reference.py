"""Softmax attention by its definition, with all scores in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs, Outputs


def in_sight(
    window: int | None,
    queries: Int[Array, " L"],
    keys: Int[Array, " S"],
    segments: Int[Array, "B L"] | None,
    key_segments: Int[Array, "B S"] | None,
) -> Bool[Array, "_ L S"]:
    """Returns which keys queries see: those of their segment up to themselves within the window, by their places."""
    age = queries[:, None] - keys
    visible = (age >= 0 if window is None else (age >= 0) & (age < window))[None]
    return visible if segments is None else visible & (segments[:, :, None] == key_segments[:, None])


def attend(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B S G K"],
    v: Float[Array, "B S G V"],
    visible: Bool[Array, "#B #T S"],
    scale: float,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B T H"]]:
    """Returns softmax(scale q k^T) v over the visible keys, in q's dtype, and the log of the softmax's sum.

    Products and sums are at least float32. A query that sees no key gets a mean of all values, as the library gives.
    """
    wide = jnp.promote_types(q.dtype, jnp.float32)
    groups = k.shape[2]
    grouped = q.reshape(*q.shape[:2], groups, -1, q.shape[3])
    options = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide)
    scores = scale * jnp.einsum("BTGRK,BSGK->BGRTS", grouped.astype(wide), k.astype(wide), **options)
    scores = jnp.where(visible[:, None, None], scores, -0.5 * jnp.finfo(wide).max)
    log_sum = jax.nn.logsumexp(scores, axis=-1)
    out = jnp.einsum("BGRTS,BSGV->BTGRV", jnp.exp(scores - log_sum[..., None]), v.astype(wide), **options)
    log_sum = jnp.moveaxis(log_sum, 3, 1).reshape(*q.shape[:3])
    return out.reshape(*q.shape[:3], v.shape[3]).astype(q.dtype), log_sum


def softmax_attention_reference(form: AttentionForm, inputs: AttentionInputs) -> Outputs:
    """Returns the outputs with every score in memory."""
    places = jnp.arange(inputs.q.shape[1])
    visible = in_sight(form.window, places, places, inputs.segment_ids, inputs.segment_ids)
    return attend(*inputs[:3], visible, form.scale)[: 1 + form.log_sum]
