"""The operation's arrays and sizes, and blocks in the order of their owners.

Axis letters of the operation: M blocks of a batch row, C rows of a block, N kernels [D, E], one per owner. Here the
blocks of all batch rows are counted together, K = B M of them. S blocks of one owner make a tile of R = S C rows, and
there are G tiles.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

BLOCK = 64  # rows of a block, if the caller has as many: fewer starve the matrix unit, more leave more rows free
TILES = 10  # at least, for every owner: at most a tenth more rows are multiplied than the blocks have


class GroupedShapes(NamedTuple):
    """The sizes of a call, for its kernels."""

    batch: int
    blocks: int
    rows: int
    owners: int
    features: int
    outputs: int
    dtype: np.dtype


class GroupedInputs(NamedTuple):
    """The arrays of a call; owner is None among cotangents."""

    x: Float[Array, "B M C D"]
    kernels: Float[Array, "N D E"]
    owner: Int[Array, "B M"] | None


class Grouping(NamedTuple):
    """Blocks in tiles of one owner each, owner by owner; the tiles left over are the last owner's."""

    block: Int[Array, " GS"]  # in every place; K where there is none
    place: Int[Array, " K"]  # of every block
    owner: Int[Array, " G"]  # of every tile

    def gather(self, x: Float[Array, "B M C D"]) -> Float[Array, "G R D"]:
        """Returns the rows of every tile; free places are zeros."""
        blocks = x.reshape(-1, *x.shape[2:]).at[self.block].get(mode="fill", fill_value=0)
        return blocks.reshape(len(self.owner), -1, x.shape[3])

    def take_back(self, y: Float[Array, "G R E"], like: Float[Array, "B M C _"]) -> Float[Array, "B M C E"]:
        """Returns the rows of every block to where they came from."""
        return y.reshape(len(self.block), -1, y.shape[2])[self.place].reshape(*like.shape[:3], -1)

    def sizes(self, owners: int, rows: int) -> Int[Array, " N"]:
        """Returns how many of the tiles' rows each owner has."""
        return rows * jnp.sum(jax.nn.one_hot(self.owner, owners, dtype=jnp.int32), axis=0)


def tile_blocks(blocks: int, rows: int, owners: int, most: int | None = None) -> int:
    """Returns S, how many blocks make a tile: of at most `most` rows, and of at least `BLOCK` if there are as many."""
    wanted = max(BLOCK, blocks * rows // (TILES * owners))
    wanted = wanted if most is None else min(wanted, most)
    return min(max(1, wanted // rows), blocks)


def tile_count(blocks: int, owners: int, tile: int) -> int:
    """Returns G, how many tiles of `tile` blocks hold `blocks` blocks, whatever owners they have."""
    return (blocks + min(owners, blocks) * (tile - 1)) // tile


def group(owner: Int[Array, "B M"], owners: int, tile: int) -> Grouping:
    """Returns the blocks by owner: a stable counting sort, in which every owner begins a tile of `tile` blocks."""
    owner = owner.reshape(-1)
    count = tile_count(len(owner), owners, tile)
    chosen = jax.nn.one_hot(owner, owners, dtype=jnp.int32)
    rank = jnp.sum((jnp.cumsum(chosen, axis=0) - chosen) * chosen, axis=1)
    used = -(-jnp.sum(chosen, axis=0) // tile)
    end = jnp.cumsum(used)
    place = (end - used)[owner] * tile + rank
    block = jnp.full(count * tile, len(owner), jnp.int32).at[place].set(jnp.arange(len(owner), dtype=jnp.int32))
    of_tile = jnp.sum(jnp.arange(count)[:, None] >= end, axis=1, dtype=jnp.int32)
    return Grouping(block, place, jnp.minimum(of_tile, owners - 1))
