"""The sweep: one Mosaic GPU kernel (sm_90) for everything that carries a matrix along a sequence and reads it.

A sweep visits the chunks of a sequence, forwards or backwards. Its state S `[D, E]` stays on the chip:

    out_t = coefficient * (r_t S_t),    S_t = decay S_{t-1} + coefficient * keys_t values_t^T

It is computed chunk by chunk as coefficient * (masked(r keys^T) values + decay r S). Linear attention is one sweep (r =
q, keys = k, values = v). Its three gradients are one sweep each, with the operands exchanged, and so are two of the
delta rule's gradients. One program (one warpgroup) serves `COLUMNS` of the E columns of one head, so no sum crosses
programs.

TMA loads blocks of the inputs directly from `[B, T, H, features]`, the next chunk's while this one is computed. S is
float32, rounded to bfloat16 for the matrix unit.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.mosaic_gpu.parts import (
    CHUNK,
    COLUMNS,
    FACTOR,
    SINCE_START,
    TO_END,
    WHOLE,
    along_columns,
    along_rows,
    decay_between,
    gate_blocks,
    keep,
    kept,
    load_matrix,
    matrix,
    products,
    state_block,
    sum_columns,
    token_block,
    transposed,
    visible,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import Place, StateWalk, matched, run_kernel, walk_chunks


class Read(NamedTuple):
    """Rows that read the state after their own token's write (strict: before the write).

    by_factor: also multiplies each token's output by its factor in the gates. dot_with: rows whose dot products with
    the outputs, before that factor, are summed in `Swept`.
    """

    rows: Any  # [B, T, H, D] bfloat16; here and below H heads, or a divisor of H
    coefficient: float = 1.0
    strict: bool = False
    by_factor: bool = False
    dot_with: Any = None  # [B, T, H, E] bfloat16


class Write(NamedTuple):
    """Keys and values written into the state (strict: not visible to their own token's read).

    by_factor: also multiplies each token's write by its factor in the gates.
    """

    keys: Any  # [B, T, H, D] bfloat16
    values: Any  # [B, T, H, E] bfloat16
    coefficient: float = 1.0
    strict: bool = False
    by_factor: bool = False


class Swept(NamedTuple):
    """Result of a sweep. Lists have one entry per read; dots only for reads that request them. None: not requested."""

    outs: list  # [B, T, H, E]
    final: jax.Array  # [S, H, D, E] float32, the states at the end
    local_dots: list  # [B, T, H] float32, with the part of the outputs from other tokens of the chunk
    carried_dots: list  # [B, T, H] float32, with the part from other chunks
    states: jax.Array | None  # [B, H, N, D, E] bfloat16, the state before each chunk
    matches: jax.Array | None  # [B, H, N] float32, the dot product of that state with match_with


class SweepPlan(NamedTuple):
    """The static settings of a sweep. Reads and the write hold indices into the tokens instead of arrays."""

    walk: StateWalk
    reads: tuple
    write: Write
    out_dtype: Any

    @property
    def dots(self) -> int:
        return sum(read.dot_with is not None for read in self.reads)

    @property
    def out_reuses_scores(self) -> bool:
        """Whether outputs reuse the buffer of the scores, which is free by then: SMEM limits how many programs run."""
        return self.out_dtype == jnp.bfloat16 and len(self.reads) == 1


def sweep(
    name: str,
    reads: list[Read],
    write: Write,
    gates: jax.Array | None,
    start: jax.Array,
    bounds: jax.Array | None = None,
    *,
    reverse: bool = False,
    out_dtype=jnp.bfloat16,
    save_states: bool = False,
    match_with: tuple[jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> Swept:
    """Runs one sweep as the kernel `name`.

    gates: `pack_gates(decay, reverse)`, of H heads or a divisor of H, or None. start `[S, H, D, E]` float32: the states
    before the sweep's first chunks; bounds: the chunks of every state, as in `StateWalk.of`. match_with: the states
    of a sweep in the other direction, and its start; or None.
    """
    tokens = []  # each array, once per width it is read in

    def position(array, width):
        if array is None:
            return None
        found = [i for i, (other, w) in enumerate(tokens) if other is array and w == width]
        if not found:
            tokens.append((array, width))
        return found[0] if found else len(tokens) - 1

    walk = StateWalk.of(reads[0].rows.shape[1], start, bounds, reverse=reverse)
    reads = tuple(r._replace(rows=position(r.rows, walk.inner), dot_with=position(r.dot_with, COLUMNS)) for r in reads)
    write = write._replace(keys=position(write.keys, walk.inner), values=position(write.values, COLUMNS))
    plan = SweepPlan(walk, reads, write, jnp.dtype(out_dtype))
    arrays, widths = zip(*tokens)
    inputs = {"tokens": list(arrays), "start": start, "bounds": bounds, "gates": gates, "match_with": match_with}
    out_types = _outputs(plan, start.shape, save_states, match_with is not None)
    out = run_kernel(name, partial(_program, plan, widths), out_types, _scratch(plan), walk.grid, interpret, inputs)
    local, carried = ([x.sum(0).transpose(0, 2, 1) for x in out[key]] for key in ("local_dots", "carried_dots"))
    matches = out["matches"].sum((0, -1)) if "matches" in out else None
    return Swept(out["outs"], out["final"], local, carried, out.get("states"), matches)


def decay_cotangent(
    decay: Decay, by_token: jax.Array, carried: jax.Array, matches: jax.Array, gates: jax.Array
) -> Decay:
    """Adds to `by_token` `[B, T, HV]` the gates' gradient through the state at each chunk's end.

    With dS at a chunk's end, matches `[B, HV, N]` are <dS, S at its start>, and carried sums to <dS, keys values^T>
    within a chunk. <dS, S at its end> is the sum of the two, but using it would lose digits: part of it cancels in
    `by_token`.
    """
    batch, length, heads = by_token.shape
    chunks = (batch, length // CHUNK, CHUNK, heads)
    kept = (gates[:, :, :, WHOLE, 0] * matches).transpose(0, 2, 1)
    lo_bar = by_token.reshape(chunks).at[:, :, -1].add(carried.reshape(chunks).sum(2) + kept)
    return Decay(jnp.zeros_like(decay.hi), lo_bar.reshape(by_token.shape).astype(decay.lo.dtype))


def _outputs(plan: SweepPlan, states: tuple, save_states: bool, match: bool) -> dict:
    """Returns the types of the outputs; dots and matches have one entry per block of columns. states: start's shape."""
    batch, heads, chunks, inner, outer = plan.walk[:5]
    shape, blocks = jax.ShapeDtypeStruct, outer // COLUMNS
    dots = [shape((blocks, batch, heads, chunks * CHUNK), jnp.float32)] * plan.dots
    types = {
        "outs": [shape((batch, chunks * CHUNK, heads, outer), plan.out_dtype)] * len(plan.reads),
        "final": shape(states, jnp.float32),
        "local_dots": dots,
        "carried_dots": dots,
    }
    if save_states:
        types["states"] = shape((batch, heads, chunks, inner, outer), jnp.bfloat16)
    if match:
        types["matches"] = shape((blocks, batch, heads, chunks, inner), jnp.float32)
    return types


def _crowded(plan: SweepPlan) -> bool:
    return plan.dots > 1 or (plan.dots == 1 and plan.walk.inner > 64)


def _scratch(plan: SweepPlan) -> dict:
    inner = plan.walk.inner
    return {
        "state": matrix(inner, COLUMNS),
        # With the dot products, an exact state of 128 rows, or one with two reads, does not fit into the registers.
        "exact_state": [matrix(inner, COLUMNS, jnp.float32)] if _crowded(plan) else [],
        "scores": matrix(CHUNK, CHUNK),
        "out": [] if plan.out_reuses_scores else [matrix(CHUNK, COLUMNS, plan.out_dtype)],
    }


def _program(plan: SweepPlan, widths, inputs, outputs, scratch):
    """Sweeps over all chunks for one block of columns of one state; arguments are trees of references."""
    place = plan.walk.place(inputs["bounds"])
    arrivals = {
        number: token_block(array, place, place.row, place.head, width, place.column if width != array.shape[3] else 0)
        for number, (array, width) in enumerate(zip(inputs["tokens"], widths))
    }
    if inputs["gates"] is not None:
        arrivals |= gate_blocks(inputs["gates"], place)
    if inputs["match_with"] is not None:
        arrivals["match_with"] = state_block(inputs["match_with"][0], place)

    def step(chunk, blocks, state):
        gates = (blocks["by_row"], blocks["by_column"]) if "by_row" in blocks else None
        if "states" in outputs:
            target = outputs["states"].at[place.row, place.head, chunk, :, place.columns]
            plgpu.copy_smem_to_gmem(scratch["state"], target)
        if "matches" in outputs:
            target = outputs["matches"].at[place.column, place.row, place.head, chunk]
            for row in range(0, plan.walk.inner, 64):
                other = matched(place, chunk, blocks["match_with"], inputs["match_with"][1], row)
                target[pl.ds(row, 64)] = sum_columns(kept(scratch, state, row) * other)
        _read_chunk(plan, blocks, gates, scratch, outputs, place, chunk)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        return _write_chunk(plan, blocks, gates, scratch, state)

    walk_chunks(place, arrivals, inputs["start"], outputs["final"], scratch, step)


def _read_chunk(plan: SweepPlan, tokens, gates, scratch, outputs, place: Place, chunk):
    """Computes the outputs of one chunk and stores them to global memory."""
    here = pl.ds(chunk * CHUNK, CHUNK)
    buffer, asked = (scratch["out"] or [scratch["scores"]])[0], 0
    for number, read in enumerate(plan.reads):
        if number > 0 or not plan.out_reuses_scores:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        dots = _scores(plan, tokens, gates, scratch["scores"], read)
        plgpu.commit_smem()
        pairs = (scratch["scores"], tokens[plan.write.values]), (tokens[read.rows], scratch["state"])
        local, carried = products(*pairs)
        if gates:
            carried = carried * along_rows(gates[0].at[SINCE_START], COLUMNS)
        out = (carried + local * plan.write.coefficient) * read.coefficient
        if read.by_factor:
            out = out * along_rows(gates[0].at[FACTOR], COLUMNS)
        buffer[...] = out.astype(plan.out_dtype)
        if read.dot_with is not None:
            others = sum_columns(carried * load_matrix(tokens[read.dot_with]))
            for name, value in (("local_dots", dots), ("carried_dots", others)):
                outputs[name][asked][place.column, place.row, place.head, here] = value * read.coefficient
            asked += 1
        plgpu.commit_smem()
        target = outputs["outs"][number].at[place.row, here, place.head, place.columns]
        plgpu.copy_smem_to_gmem(buffer, target)


def _scores(plan: SweepPlan, tokens, gates, target, read: Read):
    """Stores the decayed scores of one read in the target. Returns its local dots, if requested.

    The dots use float32 scores: out_i . d_i = sum_j scores_ij (values_j . d_i), which needs no rounded output. Scores
    are rounded before any coefficient is applied, so that a sweep and its gradient's sweep round alike.
    """
    write = plan.write
    (scores,) = products((tokens[read.rows], transposed(tokens[write.keys])))
    mask = visible(plan.walk.reverse, read.strict or write.strict, gates)
    if gates:
        scores = scores * decay_between(gates, plan.walk.reverse, mask)
    else:
        scores = jnp.where(mask, scores, 0.0)
    if write.by_factor:
        scores = scores * along_columns(gates[1].at[FACTOR])
    target[...] = scores.astype(jnp.bfloat16)
    if read.dot_with is None:
        return None
    # A separate product, started late, because registers are scarce.
    (other,) = products((tokens[read.dot_with], transposed(tokens[write.values])))
    apart = jnp.where(visible(plan.walk.reverse, True, gates), scores * other, 0.0)
    return sum_columns(apart) * write.coefficient


def _write_chunk(plan: SweepPlan, tokens, gates, scratch, state):
    """Returns the state after the chunk's writes; decays the values in place."""
    write = plan.write
    keys, values = tokens[write.keys], tokens[write.values]
    if gates:
        decay = along_rows(gates[0].at[TO_END], COLUMNS)
        if write.by_factor:
            decay = decay * along_rows(gates[0].at[FACTOR], COLUMNS)
        values[...] = (load_matrix(values) * decay).astype(jnp.bfloat16)
        plgpu.commit_smem()
    after = ()
    for row in range(0, plan.walk.inner, 64):
        (written,) = products((transposed(keys.at[:, pl.ds(row, 64)]), values))
        block = kept(scratch, state, row)
        if gates:
            block = block * gates[0][WHOLE, 0]
        after = keep(scratch, after, row, block + written * write.coefficient)
    return after
