"""The wrapper of the one-layer and two-layer GPU kernels: two passes, split over a mesh."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax

from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.neural_memory.gpu_kernels import PackedTokens

_TOKENS, _OUT = PackedTokens("BTHK", "BTHK", "BTHV", "NBHCC", "NBHRC"), "BTHV"  # axes, for `shard_over_batch_and_heads`


class FinalMatrices(NamedTuple):
    """Matrices in a kernel's layout: `[B, H, K, V]`, or as tiles `[B, H, 2 tiles, 64, 64]`."""

    weights: jax.Array
    momentum: jax.Array
    anchor: jax.Array


class MatrixPasses(NamedTuple):
    """The passes of the kernels over chunks that begin with their anchors.

    forward(plan, tokens, weights, momentum) -> (out, FinalMatrices); backward(plan, tokens, weights, momentum, out_bar,
    bars) -> the cotangents of the tokens, the weights and the momentum. Only inputs are saved.
    """

    forward: Callable
    backward: Callable


def sharded(forward: Callable, backward: Callable, matrix: str) -> MatrixPasses:
    """Splits one device's passes over a mesh by rows and heads and returns them; matrix: a matrix's axes."""
    inputs, outputs = (_TOKENS, matrix, matrix), (_OUT, FinalMatrices(matrix, matrix, matrix))

    def run(plan, *arrays):
        return shard_over_batch_and_heads(partial(forward, plan), inputs, outputs)(*arrays)

    def run_backward(plan, *arrays):
        return shard_over_batch_and_heads(partial(backward, plan), (*inputs, *outputs), inputs)(*arrays)

    return MatrixPasses(run, run_backward)
