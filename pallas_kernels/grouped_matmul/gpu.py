"""The grouped product by the Mosaic GPU kernel that jax ships (compute capability 9.0).

Blocks are sorted by owner and put into tiles, and the kernel multiplies a tile at a time. The cotangent of the kernels
is the XLA form's: jax's kernel for it (`transposed_ragged_dot_mgpu`) asks the process's first device for its number of
cores when it is traced, so a program for an absent GPU could not be compiled.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.grouped_matmul.grouping import BLOCK, GroupedInputs, GroupedShapes, group, tile_blocks
from engrax.pallas_kernels.grouped_matmul.xla import kernels_cotangent
from engrax.pallas_kernels.passes import Passes

ROWS, COLUMNS, SUMMED = 128, (128, 64), 64  # of a tile: at most, one of these, at once
STAGES = 4  # blocks of both operands in shared memory
MOST_OWNERS = 64  # the kernel's code has a part for each


def unsupported(shapes: GroupedShapes) -> str | None:
    """Returns why this kernel cannot serve a call, or None if it can."""
    if shapes.dtype != jnp.bfloat16:
        return f"the GPU kernel takes bfloat16, not {shapes.dtype}"
    if shapes.rows != BLOCK:
        return f"the GPU kernel takes blocks of {BLOCK} rows, not {shapes.rows}"
    if shapes.features % SUMMED or shapes.outputs % SUMMED:
        return f"the GPU kernel takes multiples of {SUMMED} columns, not {shapes.features} and {shapes.outputs}"
    if shapes.owners > MOST_OWNERS:
        return f"the GPU kernel takes at most {MOST_OWNERS} owners, not {shapes.owners}"
    return None


def forward(interpret: bool, inputs: GroupedInputs):
    """Returns the products; nothing is saved."""
    return multiply(interpret, inputs, transposed=False), ()


def backward(interpret: bool, inputs: GroupedInputs, _residuals, bar) -> GroupedInputs:
    """Returns the cotangents of x and kernels."""
    x_bar = multiply(interpret, inputs._replace(x=bar), transposed=True)
    return GroupedInputs(x_bar, kernels_cotangent(inputs, bar), None)


passes = Passes(forward, backward)


def multiply(interpret: bool, inputs: GroupedInputs, transposed: bool):
    """Returns every block times its kernel, or times the kernel's transpose."""
    from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot  # imports jax's test utilities: a second

    x, kernels, owner = inputs
    owners, columns = len(kernels), kernels.shape[1 if transposed else 2]
    tile = tile_blocks(owner.size, BLOCK, owners, ROWS)
    tiles = group(owner, owners, tile)
    rows = tiles.gather(x)
    scope = jax.named_scope("grouped_matmul_transposed" if transposed else "grouped_matmul")
    with scope, plgpu.force_gpu_interpret_mode() if interpret else nullcontext():
        y = ragged_dot(
            rows.reshape(-1, rows.shape[2]),
            kernels,
            group_sizes=tiles.sizes(owners, rows.shape[1]),
            block_m=rows.shape[1],
            block_n=next(n for n in COLUMNS if columns % n == 0),
            block_k=SUMMED,
            max_concurrent_steps=STAGES,
            grid_block_n=1,
            transpose_rhs=transposed,
        )
    return tiles.take_back(y.reshape(*rows.shape[:2], columns), x)
