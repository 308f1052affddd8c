"""The grouped product by the TPU kernels that jax ships (megablox).

Blocks are sorted by owner and put into tiles, so the kernels compute nothing twice. The number of columns in a tile
divides all columns. The kernels have no argument for their precision and take the default of the context.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from engrax.pallas_kernels.grouped_matmul.grouping import GroupedInputs, GroupedShapes, group, tile_blocks
from engrax.pallas_kernels.mosaic_tpu.parts import LANES
from engrax.pallas_kernels.passes import Passes

ROWS = 512  # of a tile, at most
COLUMNS = {2: 1024, 4: 512}  # of a tile, at most, by the bytes of a number: what VMEM holds
SUBLANES = 16  # of a tile of bfloat16: a block has a multiple of these rows


def unsupported(shapes: GroupedShapes) -> str | None:
    """Returns why this kernel cannot serve a call, or None if it can."""
    if shapes.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 or bfloat16, not {shapes.dtype}"
    if shapes.rows % SUBLANES:
        return f"the TPU kernel takes blocks of a multiple of {SUBLANES} rows, not {shapes.rows}"
    most = COLUMNS[shapes.dtype.itemsize]
    if any(size > most and size % LANES for size in (shapes.features, shapes.outputs)):
        wanted = f"up to {most} columns or multiples of {LANES}"
        return f"the TPU kernel takes {wanted}, not {shapes.features} and {shapes.outputs}"
    return None


def forward(interpret: bool, inputs: GroupedInputs):
    """Returns the products; nothing is saved."""
    return _multiply(interpret, inputs, transposed=False), ()


def backward(interpret: bool, inputs: GroupedInputs, _residuals, bar) -> GroupedInputs:
    """Returns the cotangents of x and kernels."""
    x, kernels, _ = inputs
    x_bar = _multiply(interpret, inputs._replace(x=bar), transposed=True)
    tiles, sizes = _tiles(inputs)
    rows, bars = tiles.gather(x), tiles.gather(bar)
    tiling = _tiling(rows.shape[1], *kernels.shape[1:], x.dtype.itemsize)
    with _precision(x), jax.named_scope("grouped_matmul_of_kernels"):
        kernels_bar = tgmm(_flat(rows).T, _flat(bars), sizes, kernels.dtype, tiling, interpret=interpret)
    return GroupedInputs(x_bar, kernels_bar, None)


passes = Passes(forward, backward)


def _multiply(interpret: bool, inputs: GroupedInputs, transposed: bool):
    """Returns every block times its kernel, or times the kernel's transpose."""
    x, kernels, _ = inputs
    tiles, sizes = _tiles(inputs)
    rows, columns = tiles.gather(x), kernels.shape[1 if transposed else 2]
    tiling = _tiling(rows.shape[1], x.shape[3], columns, x.dtype.itemsize)
    with _precision(x), jax.named_scope("grouped_matmul_transposed" if transposed else "grouped_matmul"):
        y = gmm(_flat(rows), kernels, sizes, x.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
    return tiles.take_back(y.reshape(*rows.shape[:2], columns), x)


def _tiles(inputs: GroupedInputs):
    """Returns the tiles and how many rows each owner has."""
    owners, rows = len(inputs.kernels), inputs.x.shape[2]
    tile = tile_blocks(inputs.owner.size, rows, owners, ROWS)
    tiles = group(inputs.owner, owners, tile)
    return tiles, tiles.sizes(owners, tile * rows)


def _tiling(rows: int, summed: int, columns: int, itemsize: int) -> tuple[int, int, int]:
    return rows, *(_divisor(size, COLUMNS[itemsize]) for size in (summed, columns))


def _divisor(size: int, most: int) -> int:
    """Returns how many of `size` columns a tile has: a divisor, a multiple of the lanes unless it is all of them."""
    return size if size <= most else next(n for n in range(most, 0, -LANES) if size % n == 0)


def _precision(x):
    return jax.default_matmul_precision("default" if x.dtype.itemsize == 2 else "highest")


def _flat(x):
    return x.reshape(-1, x.shape[2])
