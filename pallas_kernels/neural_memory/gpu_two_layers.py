"""The GPU kernels of a two-layer neural memory: the passes over tokens and matrices.

    forward            weights and momentum stay on chip from the first chunk to the last
    backward_states    the same without queries: recomputes the matrices at the start of every chunk
    backward_reads     the derivative of the queries' reads, for all chunks at once
    backward_carry     the cotangents of the matrices, from the last chunk to the first, and of the keys

The first two are in `gpu_two_layers_kernels`, the others in `gpu_two_layers_reads` and `gpu_two_layers_carry`. The
backward pass holds 224 KiB per chunk and head with 64 hidden features, 400 KiB with 128: the matrices at the chunk's
start and the results of its reads. With segments it is twice that (`gpu_scan`).
"""

import jax.numpy as jnp

from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK
from engrax.pallas_kernels.neural_memory.gpu_kernels import RESET, PackedTokens
from engrax.pallas_kernels.neural_memory.gpu_scan import FinalMatrices, by_chunks
from engrax.pallas_kernels.neural_memory.gpu_two_layers_carry import carry_gradients
from engrax.pallas_kernels.neural_memory.gpu_two_layers_kernels import TILE, forward, states
from engrax.pallas_kernels.neural_memory.gpu_two_layers_reads import read_gradients
from engrax.pallas_kernels.neural_memory.types import Layers
from engrax.pallas_kernels.neural_memory.vjp import ScanPlan


def to_tiles(layers: Layers):
    """Returns the matrices of both layers as tiles `[B, H, 2 tiles, 64, 64]`."""
    first, second = layers
    batch, heads, key, hidden = first.shape
    first = jnp.moveaxis(first.reshape(batch, heads, key, hidden // TILE, TILE), 3, 2)
    return jnp.concatenate([first, second.reshape(batch, heads, hidden // TILE, TILE, -1)], axis=2)


def from_tiles(matrix) -> Layers:
    """Undoes `to_tiles`."""
    batch, heads, count, rows, columns = matrix.shape
    first, second = jnp.split(matrix, 2, axis=2)
    hidden = count // 2 * TILE
    first = jnp.moveaxis(first, 2, 3).reshape(batch, heads, rows, hidden)
    return first, second.reshape(batch, heads, hidden, columns)


def _forward(plan: ScanPlan, tokens: PackedTokens, weights, momentum, reset):
    found = forward(tokens, weights, momentum, reset, plan.activation, interpret=plan.interpret)
    return found["out"], FinalMatrices(found["weights"], found["momentum"], found["anchor"])


def _backward(plan: ScanPlan, tokens: PackedTokens, weights, momentum, reset, out_bar, bars: FinalMatrices):
    """Returns the cotangents of the tokens, the weights, the momentum and the reset state."""
    again = states(tokens, weights, momentum, reset, plan.activation, interpret=plan.interpret)
    reads = read_gradients(tokens, again, out_bar, plan.activation, interpret=plan.interpret)
    back = carry_gradients(tokens, again, reads, out_bar, bars, reset is not None, interpret=plan.interpret)
    rows, matches = jnp.split(back["rows_bar"], 2, axis=-2)
    last = jnp.pad(matches.sum(-1), [(0, 0)] * 3 + [(0, CHUNK - matches.shape[-2])])
    table_bar = jnp.concatenate([reads["rows_bar"], rows, last[..., None, :]], axis=-2)
    tokens_bar = PackedTokens(reads["q_bar"], back["k_bar"], -back["error_bar"], reads["write_bar"], table_bar)
    return tokens_bar, back["weights"], back["momentum"], reset and tuple(back[name] for name in RESET)


passes = by_chunks(_forward, _backward, "BHXIO")
