"""The cross entropy of a linear head, tile by tile of the vocabulary.

Forward, a running maximum and sum of exponentials per token: no more than `[B, T, tile]` logits at a time. Backward,
the logits of a tile again and, with p the softmax and dl the loss's cotangent:

    g = (p - [v is the label]) dl,    dh += g E_tile,    dE_tile = g^T h

Tiles of the vocabulary, not of the tokens: the embedding's gradient is then complete tile by tile, so that devices that
hold different rows add it up once, and not once per tile of tokens.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from engrax.pallas_kernels.common.matmul import Operands, accumulator, emulated_on_cpu, precision, rounded


class Form(NamedTuple):
    """What is static. tile: vocabulary entries at a time; operands: of the matrix products."""

    tile: int
    operands: Operands


def linear_cross_entropy_xla(
    hidden: Float[Array, "B T D"], embedding: Float[Array, "V D"], labels: Int[Array, "B T"], *, chunk_size: int
) -> Float[Array, "B T"]:
    """Returns the loss of every token, 0 where the label is -1, in the accumulator's dtype."""
    tiles = -(-embedding.shape[0] // chunk_size)
    tile = -(-embedding.shape[0] // tiles)
    dtype = hidden.dtype
    forms = dict(cpu=Form(tile, emulated_on_cpu(dtype)), default=Form(tile, dtype))
    branches = {platform: partial(_losses, form) for platform, form in forms.items()}
    return lax.platform_dependent(hidden, embedding, labels, **branches)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(form, hidden, embedding, labels):
    return _forward(form, hidden, embedding, labels)[0]


def _forward(form, hidden, embedding, labels):
    dtype, shape = accumulator(hidden.dtype), labels.shape

    def step(carry, tile):
        largest, total, at_label = carry
        logits, is_label, _ = _tile(form, hidden, embedding.shape[0], labels, tile)
        new = jnp.maximum(largest, jnp.max(logits, axis=2))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=2)
        return (new, total, at_label + jnp.sum(jnp.where(is_label, logits, 0), axis=2)), None

    start = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
    (largest, total, at_label), _ = lax.scan(step, start, _tiles(form, embedding))
    log_total = largest + jnp.log(total)
    return jnp.where(labels >= 0, log_total - at_label, 0), (hidden, embedding, labels, log_total)


def _backward(form, saved, loss_bar):
    hidden, embedding, labels, log_total = saved
    loss_bar = jnp.where(labels >= 0, loss_bar, 0)[..., None]

    def step(hidden_bar, tile):
        logits, is_label, rows = _tile(form, hidden, embedding.shape[0], labels, tile)
        logits_bar = (jnp.exp(logits - log_total[..., None]) - is_label) * loss_bar
        hidden_bar = hidden_bar + _product("btv,vd->btd", logits_bar, rows, form.operands)
        return hidden_bar, _product("btv,btd->vd", logits_bar, hidden, form.operands).astype(embedding.dtype)

    start = jnp.zeros(hidden.shape, accumulator(hidden.dtype))
    hidden_bar, embedding_bar = lax.scan(step, start, _tiles(form, embedding))
    embedding_bar = embedding_bar.reshape(-1, embedding.shape[1])[: embedding.shape[0]]
    return hidden_bar.astype(hidden.dtype), embedding_bar, None


_losses.defvjp(_forward, _backward)


def _tiles(form, embedding):
    """Returns (the first entry, the rows) of every tile; the last is filled up with zeros."""
    missing = -embedding.shape[0] % form.tile
    rows = jnp.pad(embedding, ((0, missing), (0, 0))) if missing else embedding
    rows = rows.reshape(-1, form.tile, embedding.shape[1])
    return jnp.arange(rows.shape[0]) * form.tile, rows


def _tile(form, hidden, vocabulary, labels, tile):
    """Returns the logits of a tile (-inf where it is filled up), which of them are the labels', and its rows."""
    first, rows = tile
    entry = first + jnp.arange(form.tile)
    logits = _product("btd,vd->btv", hidden, rows, form.operands)
    return jnp.where(entry < vocabulary, logits, -jnp.inf), labels[..., None] == entry, rows


def _product(axes, a, b, operands):
    a, b = rounded(a, operands), rounded(b, operands)
    return jnp.einsum(axes, a, b, precision=precision(a), preferred_element_type=accumulator(a.dtype))
