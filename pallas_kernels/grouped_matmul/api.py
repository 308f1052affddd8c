"""The public operation `grouped_matmul`: contract, validation and choice of an implementation."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from engrax.pallas_kernels.common.matmul import accumulator
from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.common.validation import check_array, check_rank
from engrax.pallas_kernels.dispatch import Choice, choose
from engrax.pallas_kernels.grouped_matmul.grouping import GroupedInputs, GroupedShapes
from engrax.pallas_kernels.grouped_matmul.reference import grouped_matmul_reference

OP = "grouped_matmul"
PRODUCTS = "grouped products"  # their name in remat policies, which know a kernel's results by name only


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
def grouped_matmul(x, kernels, owner, *, implementation=None):
    """Multiplies every block of rows with the kernel of its owner: y[b, m] = x[b, m] kernels[owner[b, m]].

    Products are summed in float32 (float64 for float64). Under a mesh each device multiplies its own rows.

    Args:
      x: blocks of C rows each, `[B, M, C, D]`; float64, float32, bfloat16 or float16. Free rows are zeros.
      kernels: `[N, D, E]`.
      owner: int `[B, M]` in [0, N) (not checked), the kernel of every block, in any order.
      implementation: None (choose), "reference", "xla", "pallas_gpu" or "pallas_tpu".

    Returns:
      The products, `[B, M, C, E]`, in the wider dtype of x and kernels.

    Raises:
      ValueError: an argument has a wrong shape or dtype; the message names it.
      NotImplementedError: `implementation` names a kernel that cannot serve this call here; the message says why.
    """
    check_rank("x", x, "[B, M, C, D]")
    check_rank("kernels", kernels, "[N, D, E]")
    check_array("x", x, "[B, M, C, D]", x.shape)
    check_array("kernels", kernels, "[N, D, E]", (kernels.shape[0], x.shape[3], kernels.shape[2]))
    check_array("owner", owner, "[B, M]", x.shape[:2], jnp.integer)
    dtype = jnp.dtype(jnp.result_type(x, kernels))
    choice = choose(OP, GroupedShapes(*x.shape[:3], *kernels.shape, dtype), implementation)
    return _run(choice, GroupedInputs(x.astype(dtype), kernels.astype(dtype), owner))


@partial(jax.jit, static_argnums=0)
def _run(choice: Choice, inputs: GroupedInputs):
    dtype = inputs.x.dtype
    if choice.reference:
        x, kernels = (a.astype(accumulator(dtype)) for a in inputs[:2])
        return grouped_matmul_reference(x, kernels, inputs.owner).astype(dtype)
    kernels_take_part = any(found.platform for _, found in choice.branches)
    run = shard_over_batch_and_heads(
        lambda *arrays: choice.run(choice.interpret, GroupedInputs(*arrays)),
        ("BMCD", None, "BM"),
        "BMCE",
        uneven="refuse" if kernels_take_part else "whole",
    )
    return checkpoint_name(run(*inputs), PRODUCTS)
