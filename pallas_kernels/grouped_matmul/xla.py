"""The grouped product in XLA: a loop over blocks on CPU, one batched product of tiles elsewhere.

On CPU a product of one block fills the cores, and a loop copies no kernel. Elsewhere the blocks of an owner are put
together into tiles (`grouping`), and all tiles multiply at once. Each tile has a copy of its kernel, and the derivative
a product per tile. Larger batches have larger tiles, not more.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.matmul import accumulator, precision
from engrax.pallas_kernels.grouped_matmul.grouping import GroupedInputs, Grouping, group, tile_blocks
from engrax.pallas_kernels.passes import Passes


def forward(_interpret: bool, inputs: GroupedInputs):
    """Returns the products; nothing is saved."""
    return lax.platform_dependent(inputs, cpu=by_block, default=by_tile), ()


def backward(_interpret: bool, inputs: GroupedInputs, _residuals, bar: Float[Array, "B M C E"]) -> GroupedInputs:
    """Returns the cotangents of x and kernels."""
    return lax.platform_dependent(inputs, bar, cpu=by_block_cotangents, default=by_tile_cotangents)


passes = Passes(forward, backward)


def by_block(inputs: GroupedInputs) -> Float[Array, "B M C E"]:
    """Returns the products, one block after the other."""
    x, kernels, owner = inputs

    def multiply(block):
        x, n = block
        return _dot("CD,DE->CE", x, _of(kernels, n)).astype(x.dtype)

    return lax.map(multiply, (_flat(x), _flat(owner))).reshape(*x.shape[:3], -1)


def by_block_cotangents(inputs: GroupedInputs, bar: Float[Array, "B M C E"]) -> GroupedInputs:
    """Returns the cotangents, one block after the other; automatic differentiation would keep a product per block."""
    x, kernels, owner = inputs

    def step(kernels_bar, block):
        x, bar, n = block
        more = _of(kernels_bar, n) + _dot("CD,CE->DE", x, bar)
        kernels_bar = lax.dynamic_update_index_in_dim(kernels_bar, more, n, 0)
        return kernels_bar, _dot("CE,DE->CD", bar, _of(kernels, n)).astype(x.dtype)

    start = jnp.zeros(kernels.shape, accumulator(kernels.dtype))
    kernels_bar, x_bar = lax.scan(step, start, (_flat(x), _flat(bar), _flat(owner)))
    return GroupedInputs(x_bar.reshape(x.shape), kernels_bar.astype(kernels.dtype), None)


def by_tile(inputs: GroupedInputs) -> Float[Array, "B M C E"]:
    """Returns the products, all tiles at once."""
    x, kernels, _ = inputs
    tiles = _tiles(inputs)
    y = _dot("GRD,GDE->GRE", tiles.gather(x), kernels[tiles.owner])
    return tiles.take_back(y.astype(x.dtype), x)


def by_tile_cotangents(inputs: GroupedInputs, bar: Float[Array, "B M C E"]) -> GroupedInputs:
    """Returns the cotangents, all tiles at once."""
    x, kernels, _ = inputs
    tiles = _tiles(inputs)
    x_bar = _dot("GRE,GDE->GRD", tiles.gather(bar), kernels[tiles.owner])
    x_bar = tiles.take_back(x_bar.astype(x.dtype), x)
    return GroupedInputs(x_bar, kernels_cotangent(inputs, bar), None)


def kernels_cotangent(inputs: GroupedInputs, bar: Float[Array, "B M C E"]) -> Float[Array, "N D E"]:
    """Returns the cotangent of the kernels, all tiles at once; the GPU kernel uses it too."""
    x, kernels, _ = inputs
    tiles = _tiles(inputs)
    by_tile = _dot("GRD,GRE->GDE", tiles.gather(x), tiles.gather(bar))
    of_owner = jax.nn.one_hot(tiles.owner, len(kernels), dtype=by_tile.dtype)
    return _dot("GN,GDE->NDE", of_owner, by_tile).astype(kernels.dtype)


def _tiles(inputs: GroupedInputs) -> Grouping:
    owners = len(inputs.kernels)
    return group(inputs.owner, owners, tile_blocks(inputs.owner.size, inputs.x.shape[2], owners))


def _dot(axes, a, b):
    return jnp.einsum(axes, a, b, precision=precision(a), preferred_element_type=accumulator(a.dtype))


def _flat(x):
    return x.reshape(-1, *x.shape[2:])


def _of(kernels, n):
    return lax.dynamic_index_in_dim(kernels, n, keepdims=False)
