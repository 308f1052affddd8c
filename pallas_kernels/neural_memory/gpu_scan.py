"""What the GPU kernels of one layer and of two are wrapped in: one differentiable function of tokens and matrices."""

from functools import partial
from typing import NamedTuple

import jax

from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.neural_memory.gpu_kernels import PackedTokens

_TOKENS, _OUT = PackedTokens("BTHK", "BTHK", "BTHV", "NBHCC", "NBHRC"), "BTHV"  # axes, for `shard_over_batch_and_heads`


class FinalMatrices(NamedTuple):
    """Matrices as a kernel has them: `[B, H, K, V]`, or as tiles `[B, H, 2 tiles, 64, 64]`."""

    weights: jax.Array
    momentum: jax.Array
    anchor: jax.Array


def differentiable(forward, backward, matrix: str):
    """Returns `scan(form, tokens, weights, momentum) -> (out, FinalMatrices)`, split over a mesh by rows and heads.

    forward: the same for one device; backward(form, tokens, weights, momentum, out_bar, bars): the cotangents of the
    tokens, the weights and the momentum. form: what is static; matrix: the axes of a matrix. Only inputs are saved.
    """
    inputs, outputs = (_TOKENS, matrix, matrix), (_OUT, FinalMatrices(matrix, matrix, matrix))

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def scan(form, tokens: PackedTokens, weights, momentum):
        return shard_over_batch_and_heads(partial(forward, form), inputs, outputs)(tokens, weights, momentum)

    def scan_fwd(form, tokens: PackedTokens, weights, momentum):
        return scan(form, tokens, weights, momentum), (tokens, weights, momentum)

    def scan_bwd(form, residuals, cotangents):
        return shard_over_batch_and_heads(partial(backward, form), (*inputs, *outputs), inputs)(*residuals, *cotangents)

    scan.defvjp(scan_fwd, scan_bwd)
    return scan
