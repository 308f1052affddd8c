"""The neural memory in its exact dual form: chunk by chunk, matrix products only, no per-token copy of the weights."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from engrax.pallas_kernels.common.segments import row_lengths, segment_starts
from engrax.pallas_kernels.dispatch import load
from engrax.pallas_kernels.neural_memory.gates import coefficients
from engrax.pallas_kernels.neural_memory.grid import aligned_grid, from_blocks, phased_grid, to_blocks
from engrax.pallas_kernels.neural_memory.types import Layers, NeuralMemoryState
from engrax.pallas_kernels.neural_memory.vjp import Blocks, Carry, Reset, run_blocks, scan_blocks


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
    implementation: str = "xla",
    interpret: bool = False,
) -> tuple[Float[Array, "B T H V"], NeuralMemoryState]:
    """Runs `neural_memory` chunk by chunk; all arrays in the dtype of the computation.

    aligned: every row is known to be at phase 0, so that the rows are plainly cut into chunks.
    implementation: what walks over the chunks, "xla" or a kernel; interpret: kernels are interpreted.
    """
    batch, length = q.shape[:2]
    phase = jnp.asarray(state.phase, jnp.int32)
    lengths = None if segment_ids is None else row_lengths(segment_ids)
    place = (length, chunk_size, lengths)
    grid = aligned_grid(batch, *place) if aligned else phased_grid(phase, *place)
    real, start = grid.holds, None
    if segment_ids is not None:
        token_real = (segment_ids >= 0)[:, :, None, None]
        q, k, v = (jnp.where(token_real, x, 0) for x in (q, k, v))  # padding may hold anything
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
        implementation=implementation,
        interpret=interpret,
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
    implementation: str = "xla",
    interpret: bool = False,
) -> tuple[Float[Array, "N B H S V"], Carry]:
    """Runs blocks that somebody laid out, each inside one chunk.

    carry: (weights, momentum, anchor), `[B, H, I, O]` per layer; reset: the first two of the reset state, for every
    row; None without segments. real: the slot holds a token; start: a segment begins at it (None: none does);
    fresh: the block begins its chunk (None: all do). Slots that are not real give 0.
    """
    table = coefficients(lr, momentum, forget, real, start, gradient_at)
    begins = None if start is None else jnp.any(start, axis=(2, 3))  # [N, B]: a segment begins in the block
    first_scores = table.write * jnp.einsum("nbhtk,nbhsk->nbhts", q, k)
    blocks, scan = Blocks(table, first_scores, q, k, v, fresh, begins), scan_blocks
    if implementation != "xla":
        scan = partial(load("neural_memory", implementation).scan_blocks, interpret=interpret)
    out, carry = run_blocks(blocks, carry, reset, activation=activation, save_every=save_every, scan=scan)
    return jnp.where(real[..., None], out, 0), carry
