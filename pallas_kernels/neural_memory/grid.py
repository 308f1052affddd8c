"""The chunk grid: tokens in blocks that never cross a chunk boundary of their row.

A row at phase p holds its first chunk_size - p tokens in block 0 and then one chunk per block. Blocks have min(T,
chunk_size) slots. Slots without a token are empty: no write, no decay. Rows at different phases need one block more
than rows known to be at phase 0. Padding after a row's last token has no slot.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped


class ChunkGrid(NamedTuple):
    """The layout of each row's tokens.

    token: the token in every slot, row by row; None if rows are simply cut into blocks (all at phase 0).
    slot: the slot of every token; None likewise.
    holds: True where a slot holds a token of the call, `[N, B, 1, S]`.
    fresh: True where a block begins its chunk, so its anchor is its initial weights; None: all do.
    """

    token: Int[Array, "B NS"] | None
    slot: Int[Array, "B T"] | None
    holds: Bool[Array, "N B 1 S"]
    fresh: Bool[Array, "N B"] | None

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks and slots per block."""
        return self.holds.shape[0], self.holds.shape[3]


def aligned_grid(batch: int, length: int, chunk_size: int, lengths: Int[Array, " B"] | None = None) -> ChunkGrid:
    """Returns the grid of rows that all begin at phase 0. lengths: number of tokens that count (None: all)."""
    slots = min(length, chunk_size)
    blocks = -(-length // slots)
    ends = jnp.full(batch, length) if lengths is None else lengths
    holds = (jnp.arange(blocks * slots)[:, None] < ends).reshape(blocks, slots, batch)
    fresh = None if lengths is None else holds[:, 0]
    return ChunkGrid(None, None, holds.transpose(0, 2, 1)[:, :, None], fresh)


def phased_grid(
    phase: Int[Array, " B"], length: int, chunk_size: int, lengths: Int[Array, " B"] | None = None
) -> ChunkGrid:
    """Returns the grid of rows that begin at any phase. lengths: number of tokens that count (None: all)."""
    slots = min(length, chunk_size)
    blocks = 1 + (length + chunk_size - 2) // chunk_size  # reached by a row at phase chunk_size - 1
    block = jnp.arange(blocks)[None, :]
    start = jnp.where(block == 0, 0, block * chunk_size - phase[:, None])  # first token of each block, [B, N]
    ends = jnp.full_like(phase, length) if lengths is None else lengths
    end = jnp.minimum((block + 1) * chunk_size - phase[:, None], ends[:, None])
    token = start[:, :, None] + jnp.arange(slots)
    holds = token < end[:, :, None]
    t = jnp.arange(length)[None, :]
    own = (phase[:, None] + t) // chunk_size  # block of each token, [B, T]
    slot = own * slots + t - jnp.where(own == 0, 0, own * chunk_size - phase[:, None])
    fresh = ((block > 0) | (phase[:, None] == 0)) & (start < ends[:, None])
    token = jnp.clip(token, 0, length - 1).reshape(phase.shape[0], blocks * slots)
    return ChunkGrid(token, slot, holds.transpose(1, 0, 2)[:, :, None], fresh.T)


def _take(x: Shaped[Array, "B L ..."], index: Int[Array, "B M"]) -> Shaped[Array, "B M ..."]:
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds"))(x, index)


def to_blocks(grid: ChunkGrid, x: Shaped[Array, "B T H *D"]) -> Shaped[Array, "N B H S *D"]:
    """Lays out tokens in blocks; empty slots hold zeros or copies of other tokens."""
    blocks, slots = grid.shape
    if grid.token is None:
        pad = blocks * slots - x.shape[1]
        x = jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2)) if pad else x
    else:
        x = _take(x, grid.token)
    x = x.reshape(x.shape[0], blocks, slots, *x.shape[2:])
    return x.transpose(1, 0, 3, 2, *range(4, x.ndim))


def from_blocks(grid: ChunkGrid, x: Float[Array, "N B H S V"], length: int) -> Float[Array, "B T H V"]:
    """Returns the tokens of the call in order."""
    x = x.transpose(1, 0, 3, 2, 4)
    x = x.reshape(x.shape[0], -1, *x.shape[3:])
    return x[:, :length] if grid.slot is None else _take(x, grid.slot)
