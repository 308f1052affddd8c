"""The cross entropy of a linear head, tile by tile of the vocabulary.

The forward pass keeps a running maximum and sum of exponentials per token, with at most `[B, T, tile]` logits at a
time. The backward pass recomputes the logits of a tile. With p the softmax and dl the loss's cotangent:

    g = (p - [v is the label]) dl,    dh += g E_tile,    dE_tile = g^T h

Tiles split the vocabulary, not the tokens. The embedding's gradient is then complete tile by tile, so devices with
different rows sum it once, not once per tile of tokens.

On a mesh whose axis `tensor` divides the vocabulary, each device processes the tiles of its own entries. The devices
then combine a few numbers per token, and backward they sum dh.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from engrax.pallas_kernels.common import tensor
from engrax.pallas_kernels.common.matmul import Operands, accumulator, emulated_on_cpu, precision, rounded


class Form(NamedTuple):
    """Static settings. tile: vocabulary entries at a time; operands: of the products; soft_cap: of the logits."""

    tile: int
    operands: Operands
    soft_cap: float | None = None


def linear_cross_entropy_xla(
    hidden: Float[Array, "B T D"],
    embedding: Float[Array, "V D"],
    labels: Int[Array, "B T"],
    *,
    chunk_size: int,
    soft_cap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"], Float[Array, "B T"]]:
    """Returns (nats, correct, log of the sum) of every token, 0 where the label is -1, in the accumulator's dtype."""
    entries = embedding.shape[0] // _shares(embedding)
    tiles = -(-entries // chunk_size)
    tile = -(-entries // tiles)
    dtype = hidden.dtype
    forms = dict(cpu=Form(tile, emulated_on_cpu(dtype), soft_cap), default=Form(tile, dtype, soft_cap))
    branches = {platform: partial(_losses, form) for platform, form in forms.items()}
    return lax.platform_dependent(hidden, embedding, labels, **branches)


def _shares(embedding: Float[Array, "V D"]) -> int:
    """The number of devices that split the vocabulary."""
    return 1 if embedding.shape[0] % tensor.shares() else tensor.shares()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(form, hidden, embedding, labels):
    return _forward(form, hidden, embedding, labels)[0]


def _forward(form, hidden, embedding, labels):
    share = partial(_forward_share, form)
    if _shares(embedding) > 1:
        in_specs = (tensor.split(None), tensor.split(0), tensor.split(None))
        largest, best, total, at_label = tensor.on_shares(share, in_specs, tensor.split(None))(
            hidden, embedding, labels
        )
    else:
        largest, best, total, at_label = share(None, hidden, embedding, labels)
    log_total, real = largest + jnp.log(total), labels >= 0
    found = jnp.where(real, log_total - at_label, 0), real & (best == labels), jnp.where(real, log_total, 0)
    return found, (hidden, embedding, labels, log_total)


def _forward_share(form, index, hidden, embedding, labels):
    """The largest logit, its entry, the sum of exponentials below it and the label's logit, [B, T] each; `index`: which
    of the devices' shares of the vocabulary the rows of `embedding` are, None = all."""
    dtype, shape = accumulator(hidden.dtype), labels.shape
    labels, before = _own_labels(index, embedding, labels)

    def step(carry, tile):
        largest, best, total, at_label = carry
        logits, is_label, _ = _tile(form, hidden, embedding.shape[0], labels, tile)
        highest = jnp.max(logits, axis=2)
        first = (tile[0] + jnp.argmax(logits, axis=2)).astype(jnp.int32)
        best = jnp.where(highest > largest, first, best)  # the first of equal logits, like argmax
        new = jnp.maximum(largest, highest)
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits - new[..., None]), axis=2)
        return (new, best, total, at_label + jnp.sum(jnp.where(is_label, logits, 0), axis=2)), None

    zero = jnp.zeros(shape, dtype)
    start = (jnp.full(shape, -jnp.inf, dtype), jnp.zeros(shape, jnp.int32), zero, zero)
    (largest, best, total, at_label), _ = lax.scan(step, start, _tiles(form, embedding))
    if index is None:
        return largest, best, total, at_label
    highest = lax.pmax(largest, tensor.TENSOR)
    total, at_label = lax.psum((total * jnp.exp(largest - highest), at_label), tensor.TENSOR)
    first = jnp.where(largest == highest, before + best, jnp.iinfo(jnp.int32).max)
    return highest, lax.pmin(first, tensor.TENSOR), total, at_label


def _own_labels(index, embedding, labels):
    """The labels counted from the share's first entry, and that entry; a label of another share is out of range."""
    if index is None:
        return labels, 0
    before = (index[0] * embedding.shape[0]).astype(labels.dtype)
    return labels - before, before


def _backward(form, saved, cotangents):
    hidden, embedding, labels, log_total = saved
    nats_bar, _, log_total_bar = cotangents
    real = labels >= 0
    nats_bar = jnp.where(real, nats_bar, 0)[..., None]
    total_bar = nats_bar + jnp.where(real, log_total_bar, 0)[..., None]
    args, share = (hidden, embedding, labels, log_total, nats_bar, total_bar), partial(_backward_share, form)
    if _shares(embedding) == 1:
        return *share(None, *args), None
    whole, rows = tensor.split(None), tensor.split(0)
    return *tensor.on_shares(share, (whole, rows, *[whole] * 4), (whole, rows))(*args), None


def _backward_share(form, index, hidden, embedding, labels, log_total, nats_bar, total_bar):
    """The cotangents of hidden and embedding."""
    labels, _ = _own_labels(index, embedding, labels)

    def step(hidden_bar, tile):
        logits, is_label, rows = _tile(form, hidden, embedding.shape[0], labels, tile)
        logits_bar = jnp.exp(logits - log_total[..., None]) * total_bar - is_label * nats_bar
        if form.soft_cap is not None:
            slope = 1 - (logits / form.soft_cap) ** 2
            logits_bar = jnp.where(jnp.isfinite(logits), logits_bar * slope, 0)
        hidden_bar = hidden_bar + _product("btv,vd->btd", logits_bar, rows, form.operands)
        return hidden_bar, _product("btv,btd->vd", logits_bar, hidden, form.operands).astype(embedding.dtype)

    start = jnp.zeros(hidden.shape, accumulator(hidden.dtype))
    hidden_bar, embedding_bar = lax.scan(step, start, _tiles(form, embedding))
    embedding_bar = embedding_bar.reshape(-1, embedding.shape[1])[: embedding.shape[0]]
    hidden_bar = hidden_bar if index is None else lax.psum(hidden_bar, tensor.TENSOR)
    return hidden_bar.astype(hidden.dtype), embedding_bar


_losses.defvjp(_forward, _backward)


def _tiles(form, embedding):
    """Returns (first entry, rows) of every tile; the last tile is padded with zeros."""
    missing = -embedding.shape[0] % form.tile
    rows = jnp.pad(embedding, ((0, missing), (0, 0))) if missing else embedding
    rows = rows.reshape(-1, form.tile, embedding.shape[1])
    return jnp.arange(rows.shape[0]) * form.tile, rows


def _tile(form, hidden, vocabulary, labels, tile):
    """Returns the logits of a tile (-inf at padding), the mask of the labels' logits, and its rows."""
    first, rows = tile
    entry = first + jnp.arange(form.tile)
    logits = _product("btd,vd->btv", hidden, rows, form.operands)
    logits = logits if form.soft_cap is None else form.soft_cap * jnp.tanh(logits / form.soft_cap)
    inside = entry < vocabulary
    return jnp.where(inside, logits, -jnp.inf), inside & (labels[..., None] == entry), rows


def _product(axes, a, b, operands):
    a, b = rounded(a, operands), rounded(b, operands)
    return jnp.einsum(axes, a, b, precision=precision(a), preferred_element_type=accumulator(a.dtype))
