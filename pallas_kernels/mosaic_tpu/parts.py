"""Shared parts of the TPU kernels: calls, trees of references, tile sizes.

A kernel's arguments are trees of arrays in the standard layout of its operation. Rows and heads are the parallel axes
of its grid. Its last axes run in order, and scratch memory carries the state along them.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Refs = Any  # a tree of references to memory, shaped like a tree of arrays

SUBLANES, LANES = 8, 128  # a tile of float32
# A core of v5e and v6e has 128 MiB of VMEM. Sizes are estimates, so kernels are refused well below their limit.
VMEM_BYTES, VMEM_LIMIT = 64 * 2**20, 96 * 2**20


def call(
    kernel: Callable,
    *,
    name: str,
    grid,
    parallel: int,
    inputs,
    in_specs,
    outputs,
    out_specs,
    scratch,
    interpret: bool,
    prefetch: tuple = (),
):
    """Runs a kernel. The `parallel` grid axes come first and run in any order; the others run in order.

    Returns the tree of outputs.

    kernel: takes references to the arrays of `prefetch`, then the trees of references to inputs, outputs and scratch
    memory. name: of the kernel in a profile. outputs: a tree of `jax.ShapeDtypeStruct`. prefetch: integer arrays in
    scalar memory, passed to index maps after the grid indices.
    """
    run = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(prefetch),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * parallel + ("arbitrary",) * (len(grid) - parallel),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
    )
    return run(*prefetch, *inputs)


def scratch_like(tree, *lead: int):
    """Returns float32 scratch memory for every array of the tree, shaped `lead` plus the array's last two axes."""
    return jax.tree.map(lambda x: pltpu.VMEM((*lead, *x.shape[-2:]), jnp.float32), tree)


def load(refs: Refs):
    """Returns the tree of values in the references."""
    return jax.tree.map(lambda ref: ref[...], refs)


def store(refs: Refs, values) -> None:
    """Writes a tree of values."""

    def write(ref, value):
        ref[...] = value

    jax.tree.map(write, refs, values)


def store_zeros(refs: Refs) -> None:
    """Writes zeros everywhere."""
    store(refs, jax.tree.map(lambda ref: jnp.zeros(ref.shape, ref.dtype), refs))


def tiled_bytes(rows: int, columns: int, itemsize: int = 4) -> int:
    """Returns the bytes of a matrix in VMEM, rounded up to whole tiles."""
    sublanes = SUBLANES * 4 // itemsize
    return itemsize * (-(-rows // sublanes) * sublanes) * (-(-columns // LANES) * LANES)
