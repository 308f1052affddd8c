"""The neural memory in its exact dual form: chunk by chunk, by matrix products, without per-token weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engrax.pallas_kernels.common.segments import row_lengths, segment_starts
from engrax.pallas_kernels.dispatch import Choice
from engrax.pallas_kernels.neural_memory.gates import coefficients
from engrax.pallas_kernels.neural_memory.grid import aligned_grid, from_blocks, phased_grid, to_blocks
from engrax.pallas_kernels.neural_memory.types import Layers, NeuralMemoryState
from engrax.pallas_kernels.neural_memory.vjp import (
    Blocks,
    ScanInputs,
    ScanOutputs,
    ScanPlan,
    run_blocks,
    scan_blocks,
)
from engrax.pallas_kernels.passes import Passes


def neural_memory_xla(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    lr: Float[Array, "B T H"],
    momentum: Float[Array, "B T H"],
    forget: Float[Array, "B T H"],
    state: NeuralMemoryState,
    reset: tuple[Layers, Layers] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    activation: str,
    gradient_at: str,
    chunk_size: int,
    save_every: int,
    aligned: bool,
    choice: Choice,
) -> tuple[Float[Array, "B T H V"], NeuralMemoryState]:
    """Runs `neural_memory` chunk by chunk; all arrays in the dtype of the computation.

    aligned: every row is known to be at phase 0, so rows are simply cut into chunks.
    choice: the implementations of the walk over chunks.
    """
    batch, length = q.shape[:2]
    phase = jnp.asarray(state.phase, jnp.int32)
    lengths = None if segment_ids is None else row_lengths(segment_ids)
    place = (length, chunk_size, lengths)
    grid = aligned_grid(batch, *place) if aligned else phased_grid(phase, *place)
    real, start = grid.holds, None
    if segment_ids is not None:
        token_real = (segment_ids >= 0)[:, :, None, None]
        q, k, v = (jnp.where(token_real, x, 0) for x in (q, k, v))  # padding may hold any value
        real = real & to_blocks(grid, (segment_ids >= 0)[:, :, None])
        start = real & to_blocks(grid, segment_starts(segment_ids)[:, :, None])
        reset = jax.tree.map(lambda m: jnp.broadcast_to(m, (batch, *m.shape)), reset)
    else:
        reset = None
    q, k, v, lr, momentum, forget = (to_blocks(grid, x) for x in (q, k, v, lr, momentum, forget))
    table = coefficients(lr, momentum, forget, real, start, gradient_at)
    begun = None if start is None else jnp.cumsum(start[:, :, 0], axis=-1) > 0
    first_scores = table.write * jnp.einsum("nbhtk,nbhsk->nbhts", q, k)
    blocks = Blocks(table, first_scores, q, k, v, grid.fresh, begun)
    options = dict(activation=activation, save_every=save_every, aligned=aligned, choice=choice)
    out, carry = run_blocks(blocks, tuple(state[:3]), reset, **options)
    phase = (phase + (length if lengths is None else lengths)) % chunk_size
    out = jnp.where(real[..., None], out, 0)
    return from_blocks(grid, out, length), NeuralMemoryState(*carry, phase)


def _scan(plan: ScanPlan, inputs: ScanInputs) -> ScanOutputs:
    return scan_blocks(plan, *inputs)


passes = Passes.of(_scan)
