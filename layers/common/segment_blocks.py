"""Rows cut into segments of C tokens, for attention inside segments: each token has a place in its segment.

Rows may be at different places. A call of several tokens becomes blocks of C slots, slot s for place s; a slot without
a token is a hole. A call of one token becomes one block of one slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from engrax.layers.common.conv import ShortConv
from engrax.layers.common.segments import first_real_segment


class BlockIndex(NamedTuple):
    """The positions of the tokens of one block (for all blocks of a call, with a leading axis N)."""

    holds: Bool[Array, "*N B S"]  # the slot holds a token
    place: Int[Array, "*N B S"]  # the slot's place in its segment
    slot: Int[Array, "*N B"]  # slot of the row's first token in the block
    first: Int[Array, "*N B"]  # its place
    count: Int[Array, "*N B"]  # tokens of the row in the block

    def merge(self, old, new):
        """Returns arrays by place `[B, C, ...]` with the block's `[B, S, ...]` in the places it holds."""

        def one(a, b):
            b = b.astype(a.dtype)
            if b.shape[1] == a.shape[1]:
                return jnp.where(self.holds.reshape(*self.holds.shape, *[1] * (b.ndim - 2)), b, a)
            at = jnp.where(self.holds[:, 0], self.place[:, 0], a.shape[1])  # a hole is dropped
            return jax.vmap(lambda row, i, x: row.at[i].set(x, mode="drop"))(a, at, b[:, 0])

        return jax.tree.map(one, old, new)

    def to_front(self, tree):
        """Returns arrays by slot `[B, S, ...]` with the row's first token at slot 0, and its holes at the end."""
        return self._rolled(tree, self.slot)

    def from_front(self, tree):
        """Undoes `to_front`."""
        return self._rolled(tree, -self.slot)

    def _rolled(self, tree, by):
        slots = self.holds.shape[1]
        if slots == 1:
            return tree
        index = (jnp.arange(slots) + by[:, None]) % slots
        return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, index), tree)


class BlockLayout(NamedTuple):
    """The blocks of a call, and the slot of every token."""

    blocks: BlockIndex  # leading axis N
    length: int  # tokens of every row
    token: Int[Array, "N B S"] | None  # None: rows are plainly cut into blocks
    index: Int[Array, "B T"] | None  # of every token among the N * S slots of its row; None likewise

    @property
    def is_aligned(self) -> bool:
        """Whether every block is known to begin a segment."""
        return self.token is None and self.blocks.holds.shape[2] > 1

    @property
    def is_full(self) -> bool:
        """Whether every slot holds a token of rows that are as long as the call."""
        return self.token is None and self.length % self.blocks.holds.shape[2] == 0

    def to_blocks(self, x: Shaped[Array, "B T *D"]) -> Shaped[Array, "N B S *D"]:
        """Returns the slots; holes hold zeros or copies of other tokens."""
        if self.token is not None:
            return jax.vmap(lambda row, i: row[i], in_axes=(0, 1), out_axes=1)(
                x, self.token
            )  # rows stay apart on a mesh
        blocks, _, slots = self.blocks.holds.shape
        x = jnp.pad(x, [(0, 0), (0, blocks * slots - self.length)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(len(x), blocks, slots, *x.shape[2:]), 1, 0)

    def from_blocks(self, x: Shaped[Array, "N B S *D"]) -> Shaped[Array, "B T *D"]:
        """Returns the tokens in their order."""
        x = jnp.moveaxis(x, 0, 1)
        x = x.reshape(x.shape[0], -1, *x.shape[3:])
        return x[:, : self.length] if self.index is None else jax.vmap(lambda row, i: row[i])(x, self.index)


def block_index(
    place: Int[Array | np.ndarray, " B"], length: int, size: int, lengths: Int[Array, " B"] | None = None
) -> BlockLayout:
    """Lays out `length` tokens of rows with the first token at `place`; `lengths`: number of valid tokens (None: all).

    A NumPy array of zeros is known when a program is traced, and saves a block.
    """
    aligned = isinstance(place, np.ndarray) and not place.any()
    place, t = jnp.asarray(place, jnp.int32), jnp.arange(length)
    if length == 1:
        one = jnp.ones((1, len(place), 1), jnp.int32)
        held = one if lengths is None else lengths[None, :, None]
        blocks = BlockIndex(held > 0, place[None, :, None], 0 * one[..., 0], place[None], held[..., 0])
        return BlockLayout(blocks, 1, None, None)
    count = -(-length // size) if aligned else 1 + -(-(length - 1) // size)
    n, s = jnp.arange(count)[:, None, None], jnp.arange(size)
    token = n * size + s - place[:, None]
    holds = (token >= 0) & (token < (length if lengths is None else lengths[:, None]))
    first = jnp.where(n[..., 0] == 0, place, 0)
    where = jnp.broadcast_to(s, holds.shape)
    blocks = BlockIndex(holds, where, first, first, jnp.sum(holds, axis=-1, dtype=jnp.int32))
    if aligned:
        return BlockLayout(blocks, length, None, None)
    return BlockLayout(blocks, length, jnp.clip(token, 0, length - 1), place[:, None] + t)


def conv_in_block(
    conv: ShortConv, x: Float[Array, "B S N"], tail: Float[Array, "B W N"], places: BlockIndex, ids: Int[Array, "B S"]
) -> tuple[Float[Array, "B S N"], Float[Array, "B W N"]]:
    """A short convolution over the tokens of one block without holes: (output, new tail).

    ids: -1 in holes and padding. The tail is placed directly before the row's first token.
    """
    W, _S = tail.shape[1], x.shape[1]
    if W == 0:
        return conv(x, tail, ids)
    first_id = first_real_segment(ids)[:, None]
    put = jax.vmap(lambda row, piece, at: jax.lax.dynamic_update_slice_in_dim(row, piece, at, axis=0))
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, W, axis=0))
    blank = jnp.zeros((len(x), W, x.shape[-1]), x.dtype)
    row = put(jnp.concatenate([blank, x], axis=1), tail.astype(x.dtype), places.slot)
    row_ids = put(
        jnp.pad(ids, ((0, 0), (W, 0)), constant_values=-1), jnp.broadcast_to(first_id, (len(x), W)), places.slot
    )
    y, _ = conv(row[:, W:], row[:, :W], row_ids[:, W:])
    end = places.slot + places.count
    newest, newest_ids = cut(row, end), cut(row_ids, end)
    last = jnp.max(row_ids, axis=1, keepdims=True)
    newest = jnp.where((newest_ids == last)[..., None], newest, 0)
    return y, jnp.where((places.count > 0)[:, None, None], newest, tail).astype(tail.dtype)
