"""The neural memory in its exact dual form: chunk by chunk, by matrix products, without per-token weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from engrax.pallas_kernels.common.segments import row_lengths, segment_starts
from engrax.pallas_kernels.dispatch import Choice, choose
from engrax.pallas_kernels.neural_memory.gates import coefficients
from engrax.pallas_kernels.neural_memory.grid import aligned_grid, from_blocks, phased_grid, to_blocks
from engrax.pallas_kernels.neural_memory.types import OP, Layers, MemoryShapes, NeuralMemoryState
from engrax.pallas_kernels.neural_memory.vjp import (
    Blocks,
    Carry,
    Reset,
    ScanInputs,
    ScanOutputs,
    ScanPlan,
    group_size,
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
    tokens = (to_blocks(grid, x) for x in (q, k, v, lr, momentum, forget))
    out, carry = run_grid(
        *tokens,
        tuple(state[:3]),
        reset,
        real=real,
        start=start,
        fresh=grid.fresh,
        activation=activation,
        gradient_at=gradient_at,
        save_every=save_every,
        aligned=aligned,
        choice=choice,
    )
    phase = (phase + (length if lengths is None else lengths)) % chunk_size
    return from_blocks(grid, out, length), NeuralMemoryState(*carry, phase)


def run_grid(
    q: Float[Array, "N B H S K"],
    k: Float[Array, "N B H S K"],
    v: Float[Array, "N B H S V"],
    lr: Float[Array, "N B H S"],
    momentum: Float[Array, "N B H S"],
    forget: Float[Array, "N B H S"],
    carry: Carry,
    reset: Reset,
    *,
    real: Bool[Array, "N B 1 S"],
    start: Bool[Array, "N B 1 S"] | None,
    fresh: Bool[Array, "N B"] | None,
    activation: str,
    gradient_at: str = "anchor",
    save_every: int = 1,
    aligned: bool = False,
    choice: Choice | None = None,
) -> tuple[Float[Array, "N B H S V"], Carry]:
    """Runs blocks laid out by the caller, each inside one chunk.

    carry: (weights, momentum, anchor), `[B, H, I, O]` per layer; reset: weights and momentum of the reset state, for
    every row; None without segments. real: the slot holds a token. start: a segment begins at the slot (None: nowhere).
    fresh: the block begins its chunk (None: all do). Slots that are not real give 0. aligned: blocks that are not fresh
    are empty. choice: the implementations of the walk over blocks; None: the XLA form.
    """
    if choice is None:
        choice = choose(OP, _shapes(q, carry[0], save_every, start is not None), "xla")
    table = coefficients(lr, momentum, forget, real, start, gradient_at)
    begun = None if start is None else jnp.cumsum(start[:, :, 0], axis=-1) > 0
    first_scores = table.write * jnp.einsum("nbhtk,nbhsk->nbhts", q, k)
    blocks = Blocks(table, first_scores, q, k, v, fresh, begun)
    options = dict(activation=activation, save_every=save_every, aligned=aligned, choice=choice)
    out, carry = run_blocks(blocks, carry, reset, **options)
    return jnp.where(real[..., None], out, 0), carry


def _shapes(q, weights: Layers, save_every: int, segments: bool) -> MemoryShapes:
    """Returns the shapes of a call whose caller laid out the blocks."""
    count, batch, heads, slots, _ = q.shape
    layers, group, dtype = tuple(w.shape[2:] for w in weights), group_size(count, slots, save_every), jnp.dtype(q.dtype)
    return MemoryShapes(dtype, layers, slots, group, dtype, batch, heads, count, False, segments)


def _scan(plan: ScanPlan, inputs: ScanInputs) -> ScanOutputs:
    return scan_blocks(plan, *inputs)


passes = Passes.of(_scan)
