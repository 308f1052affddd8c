"""Softmax attention for any device, in blocks of queries that see a static range of keys: no T x T scores.

A row has few blocks, each with the keys that any of its queries sees. If the window is much shorter than the row, it
has blocks as long as the window, which see themselves and the block before. Large blocks are computed in tiles, one
after the other, whose weights the backward pass recomputes: on a CPU this is as fast as saving them, in a fifth of the
memory. The attention of a tile is `jax.nn.dot_product_attention`. It is an einsum in float64, where the library has an
error of 1e-7, and if the log of the sum is wanted, of which the library has no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from engrax.pallas_kernels.passes import Passes
from engrax.pallas_kernels.softmax_attention.reference import attend, in_sight
from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs, Outputs

TILE = 128  # queries of a tile
BLOCKS = 4  # most blocks of a row
SMALLEST_WINDOW = 32  # queries of the smallest block of a short window


def softmax_attention_xla(form: AttentionForm, inputs: AttentionInputs) -> Outputs:
    """Returns the outputs; the work grows with T times the window."""
    length = inputs.q.shape[1]
    if form.window is not None and form.window < min(_block_size(length), length):
        return _near(form, inputs, max(form.window, SMALLEST_WINDOW))
    return _rows(form, 0, inputs, inputs)


passes = Passes.of(softmax_attention_xla)


def earlier_terms(form: AttentionForm, before: int | Array, queries: AttentionInputs, keys: AttentionInputs) -> Outputs:
    """Returns the attention of queries to keys that all come before them, for `merge_attention`: key i is `before` - i
    tokens before the first query. The q of `keys` is not used."""
    run = _tiles if queries.q.shape[1] > TILE else _tile
    return run(form._replace(log_sum=True), before, queries, keys)


def _block_size(length: int) -> int:
    return _rounded_up(-(-length // BLOCKS), TILE)


def _rounded_up(size: int, multiple: int) -> int:
    return size + -size % multiple


def _rows(form: AttentionForm, before: int, queries: AttentionInputs, keys: AttentionInputs) -> Outputs:
    """At most BLOCKS blocks. Key `before` + i is query i's own, here and below."""
    length, parts = queries.q.shape[1], []
    size = _block_size(length)
    for start in range(0, length, size):
        end = min(start + size, length)
        first = 0 if form.window is None else max(0, before + start - form.window + 1)
        mine, seen = _cut(queries, start, end), _cut(keys, first, before + end)
        run = _tiles if size > TILE else _tile
        parts.append(run(form, before + start - first, mine, seen))
    return tuple(jnp.concatenate(part, axis=1) for part in zip(*parts))


def _cut(inputs: AttentionInputs, start: int, end: int) -> AttentionInputs:
    return jax.tree.map(lambda x: x[:, start:end], inputs)


def _tiles(form: AttentionForm, before: int, queries: AttentionInputs, keys: AttentionInputs) -> Outputs:
    """`_tile` for TILE queries at a time."""
    length = queries.q.shape[1]
    tiles = jax.tree.map(lambda x: jnp.moveaxis(_blocks(TILE, x), 1, 0), queries)
    run = jax.checkpoint(lambda start, tile: _tile(form, before + start, tile, keys))
    outputs = jax.lax.map(lambda args: run(*args), (TILE * jnp.arange(len(tiles.q)), tiles))
    return _joined([jnp.moveaxis(x, 0, 1) for x in outputs], length)


def _near(form: AttentionForm, inputs: AttentionInputs, size: int) -> Outputs:
    """Blocks of `size` queries, at least the window, that see themselves and the block before; some at a time."""
    batch, length = inputs.q.shape[:2]
    if inputs.segment_ids is None:  # marks the empty slots before a row
        inputs = inputs._replace(segment_ids=jnp.zeros((batch, length), jnp.int32))
    together = _rounded_up(TILE, size) // size

    def steps(x):  # [B, M, L, ...] -> [M / together, B * together, L, ...]
        x = jnp.moveaxis(x.reshape(batch, -1, together, *x.shape[2:]), 1, 0)
        return x.reshape(len(x), -1, *x.shape[3:])

    blocks = jax.tree.map(lambda x: _blocks(size, x, together), inputs)
    before = jax.tree.map(lambda x: jnp.roll(x, 1, axis=1), blocks)
    before = jax.tree.map(lambda x: x.at[:, 0].set(_empty(x)), before)
    pairs = jax.tree.map(lambda *both: jnp.concatenate(both, axis=2), before, blocks)
    run = jax.checkpoint(lambda args: _rows(form, size, *args))
    outputs = jax.lax.map(run, jax.tree.map(steps, (blocks, pairs)))
    outputs = [x.reshape(len(x), batch, -1, *x.shape[3:]) for x in outputs]
    return _joined([jnp.moveaxis(x, 0, 1) for x in outputs], length)


def _blocks(size: int, x: Shaped[Array, "B T *D"], multiple: int = 1) -> Shaped[Array, "B M L *D"]:
    """Cuts rows into blocks, a multiple of `multiple`; the last are filled up with empty tokens."""
    after = -x.shape[1] % (size * multiple)
    x = jnp.pad(x, [(0, 0), (0, after)] + [(0, 0)] * (x.ndim - 2), constant_values=_empty(x))
    return x.reshape(len(x), -1, size, *x.shape[2:])


def _empty(x: Array) -> int:
    """The value of an empty token: 0, and as a segment that of padding."""
    return -1 if jnp.issubdtype(x.dtype, jnp.integer) else 0


def _joined(outputs: list[Shaped[Array, "B M L ..."]], length: int) -> Outputs:
    """The rows of blocks [B, M, L, ...], cut to their length."""
    return tuple(x.reshape(len(x), -1, *x.shape[3:])[:, :length] for x in outputs)


def _tile(form: AttentionForm, before: int | Array, queries: AttentionInputs, keys: AttentionInputs) -> Outputs:
    """The attention of a tile of queries; the scores are as large as its mask."""
    q, k, v = queries.q, keys.k, keys.v
    places = before + jnp.arange(q.shape[1]), jnp.arange(k.shape[1])
    visible = in_sight(form.window, *places, queries.segment_ids, keys.segment_ids)
    if form.log_sum or q.dtype == jnp.float64:
        return attend(q, k, v, visible, form.scale)[: 1 + form.log_sum]
    options = dict(mask=visible[:, None], scale=form.scale, implementation="xla")
    return (jax.nn.dot_product_attention(q, k, v, **options),)
