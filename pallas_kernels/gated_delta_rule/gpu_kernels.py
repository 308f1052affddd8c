"""Mosaic GPU kernels (sm_90) of the gated delta rule that are not sweeps (`mosaic_gpu.scan`): one system per chunk.

One kernel computes the inverse X = (I + A)^-1 of every chunk by the ladder (`inverse.py`), in any order of chunks. The
two others carry a state along the chunks, 64 columns per program as in a sweep: forwards S, with written = X beta (v -
decay k S), and backwards dS, with the solution's cotangent X^T (...).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import (
    CHUNK,
    COLUMNS,
    FACTOR,
    SINCE_START,
    TO_END,
    WHOLE,
    along_rows,
    decay_between,
    gate_blocks,
    keep,
    kept,
    ladder,
    load_matrix,
    matrix,
    products,
    split,
    state_block,
    sum_columns,
    token_block,
    transposed,
    visible,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import Place, StateWalk, matched, run_kernel, walk_chunks

# ---------------------------------------------------------------------------------------------------------------------
# The inverse


def inverses(name: str, k: jax.Array, gates: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns X `[B, T, HV, C]` in float32; gates `[B, HV, N, 7, C]` with beta as the factor."""
    batch, length, _, features = k.shape
    heads, chunks = gates.shape[1:3]
    out_types = {"x": jax.ShapeDtypeStruct((batch, length, heads, CHUNK), jnp.float32)}
    scratch = {
        "k": matrix(CHUNK, features),
        "x": matrix(CHUNK, CHUNK, jnp.float32),
        "gates": [plgpu.SMEM(gates.shape[3:], jnp.float32) for _ in range(2)],
        "arrived": plgpu.Barrier(num_arrivals=3),
        "pairs": [[matrix(CHUNK, CHUNK) for _ in range(2)] for _ in range(2)],
    }
    body = partial(_invert, heads // k.shape[2])
    inputs = {"k": k, "gates": gates}
    return run_kernel(name, body, out_types, scratch, (batch, heads, chunks), interpret, inputs)["x"]


def _invert(group: int, inputs, outputs, scratch):
    batch, head, chunk = (lax.axis_index(name) for name in ("batch", "head", "part"))
    tokens = pl.ds(chunk * CHUNK, CHUNK)
    plgpu.copy_gmem_to_smem(inputs["k"].at[batch, tokens, head // group], scratch["k"], scratch["arrived"])
    for target in scratch["gates"]:
        plgpu.copy_gmem_to_smem(inputs["gates"].at[batch, head, chunk], target, scratch["arrived"])
    plgpu.barrier_wait(scratch["arrived"])
    (scores,) = products((scratch["k"], transposed(scratch["k"])))
    gates = scratch["gates"]
    decay = decay_between(gates, False, visible(False, True, gates))
    scratch["x"][...] = scores * decay * along_rows(gates[0].at[FACTOR])
    scratch["x"][...] = ladder(scratch["x"], *scratch["pairs"])
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["x"], outputs["x"].at[batch, tokens, head])
    plgpu.wait_smem_to_gmem(0)


# ---------------------------------------------------------------------------------------------------------------------
# The state forwards


class DeltaStates(NamedTuple):
    """The result of `forward_states`; parts not requested are None."""

    out: Any  # [B, T, HV, V] bfloat16
    final: Any  # [B, HV, K, V] float32
    written: Any  # [B, T, HV, V] bfloat16
    states: Any  # [B, HV, N, K, V] bfloat16, the state before each chunk


def forward_states(
    name: str, q, k, v, x, gates, start, bounds=None, *, scale: float = 1.0, interpret: bool = False
) -> DeltaStates:
    """Runs the rule forwards. With q it returns the outputs; without (None), the written values and the states.

    start `[S, HV, K, V]` float32 and bounds: as in `StateWalk.of`. x: the result of `inverses`. gates
    `[B, HG, N, 7, C]` with beta as the factor; their HG heads are a divisor of HV.
    """
    plan = StateWalk.of(k.shape[1], start, bounds, scale=scale)
    inner, tokens = plan.inner, jax.ShapeDtypeStruct(v.shape, jnp.bfloat16)
    out_types = {"final": jax.ShapeDtypeStruct(start.shape, jnp.float32)}
    if q is not None:
        out_types["out"] = tokens
    else:
        out_types["written"] = tokens
        out_types["states"] = jax.ShapeDtypeStruct(plan.per_chunk, jnp.bfloat16)
    scratch = {
        "state": matrix(inner, COLUMNS),
        # An exact state of 128 rows does not fit into the registers beside the outputs.
        "exact_state": [matrix(inner, COLUMNS, jnp.float32)] if inner > 64 and q is not None else [],
        "scores": [matrix(CHUNK, CHUNK)] if q is not None else [],
        "x": [matrix(CHUNK, CHUNK) for _ in range(2)],
        "rows": matrix(CHUNK, COLUMNS),
        "written": matrix(CHUNK, COLUMNS),
    }
    inputs = {"k": k, "v": v, "x": x, "gates": gates, "start": start, "bounds": bounds}
    inputs |= {} if q is None else {"q": q}
    body = partial(_advance_all, plan)
    found = run_kernel(name, body, out_types, scratch, plan.grid, interpret, inputs)
    return DeltaStates(found.get("out"), found["final"], found.get("written"), found.get("states"))


def _arrivals(place: Place, inputs, full, columns) -> dict:
    """Returns, by name, the blocks loaded for every chunk: with all features (`full`) or one block of columns."""
    mine = (place, place.row, place.head)
    found = {name: token_block(inputs[name], *mine, inputs[name].shape[3]) for name in full if name in inputs}
    found |= {name: token_block(inputs[name], *mine, COLUMNS, place.column) for name in columns}
    found |= gate_blocks(inputs["gates"], place)
    if "match_with" in inputs:
        found["match_with"] = state_block(inputs["match_with"], place)
    return found


def _advance_all(plan: StateWalk, inputs, outputs, scratch):
    place = plan.place(inputs["bounds"])

    def step(chunk, blocks, state):
        here = (place.row, pl.ds(chunk * CHUNK, CHUNK), place.head, place.columns)
        if "states" in outputs:
            target = outputs["states"].at[place.row, place.head, chunk, :, place.columns]
            plgpu.copy_smem_to_gmem(scratch["state"], target)
        written = _written(blocks, scratch)
        scratch["written"][...] = written.astype(jnp.bfloat16)
        plgpu.commit_smem()
        if "written" in outputs:
            plgpu.copy_smem_to_gmem(scratch["written"], outputs["written"].at[here])
        else:
            buffer = _output(plan, blocks, scratch)
            plgpu.copy_smem_to_gmem(buffer, outputs["out"].at[here])
        scratch["rows"][...] = (written * along_rows(blocks["by_row"].at[TO_END])).astype(jnp.bfloat16)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.commit_smem()
        after = ()
        for row in range(0, plan.inner, 64):
            (added,) = products((transposed(blocks["k"].at[:, pl.ds(row, 64)]), scratch["rows"]))
            after = keep(scratch, after, row, kept(scratch, state, row) * blocks["by_row"][WHOLE, 0] + added)
        return after

    arrivals = _arrivals(place, inputs, ("q", "k", "x"), ("v",))
    walk_chunks(place, arrivals, inputs["start"], outputs["final"], scratch, step)


def _written(blocks, scratch):
    """Returns X beta (v - decay k S)."""
    (read,) = products((blocks["k"], scratch["state"]))
    missing = load_matrix(blocks["v"]) - read * along_rows(blocks["by_row"].at[SINCE_START])
    scratch["rows"][...] = (missing * along_rows(blocks["by_row"].at[FACTOR])).astype(jnp.bfloat16)
    split(scratch["x"], load_matrix(blocks["x"]))
    plgpu.commit_smem()
    (written,) = products([(part, scratch["rows"]) for part in scratch["x"]])
    return written


def _output(plan: StateWalk, blocks, scratch):
    """Returns the buffer with the outputs of a chunk, given the written values in the scratch."""
    (buffer,) = scratch["scores"]
    (scores,) = products((blocks["q"], transposed(blocks["k"])))
    gates = (blocks["by_row"], blocks["by_column"])
    decay = decay_between(gates, False, visible(False, False, gates))
    buffer[...] = (scores * decay).astype(jnp.bfloat16)
    plgpu.commit_smem()
    out, read = products((buffer, scratch["written"]), (blocks["q"], scratch["state"]))
    out = out + read * along_rows(blocks["by_row"].at[SINCE_START])
    buffer[...] = (out * plan.scale).astype(jnp.bfloat16)
    plgpu.commit_smem()
    return buffer


# ---------------------------------------------------------------------------------------------------------------------
# The state's cotangent backwards


class DeltaCotangents(NamedTuple):
    """The result of `backward_states`, with R = beta (v - decay k S), the right-hand side of a chunk's system."""

    rows_bar: jax.Array  # [B, T, HV, V] bfloat16, dR
    v_bar: jax.Array  # [B, T, HV, V] bfloat16, beta dR
    start_bar: jax.Array  # [S, HV, K, V] float32
    dots: jax.Array  # [B, T, HV] float32, dR . v
    matches: jax.Array  # [B, HV, N] float32, <the cotangent of the state after chunk n, the state before it>


def backward_states(
    name: str, q, k, v, x, out_bar, gates, final_bar, states, start, bounds=None, *, scale: float, interpret=False
) -> DeltaCotangents:
    """Runs the cotangent of the state backwards. gates: packed for it (reverse), with beta as the factor.

    states, start: those before each chunk and before the first.
    """
    plan = StateWalk.of(k.shape[1], final_bar, bounds, scale=scale, reverse=True)
    shape, blocks = jax.ShapeDtypeStruct, plan.outer // COLUMNS
    out_types = {
        "rows_bar": shape(v.shape, jnp.bfloat16),
        "v_bar": shape(v.shape, jnp.bfloat16),
        "final": shape(final_bar.shape, jnp.float32),
        "dots": shape((blocks, plan.rows, plan.heads, k.shape[1]), jnp.float32),
        "matches": shape((blocks, *plan.per_chunk[:-1]), jnp.float32),
    }
    scratch = {
        "state": matrix(plan.inner, COLUMNS),
        "exact_state": [],
        "scores": matrix(CHUNK, CHUNK),
        "x": [matrix(CHUNK, CHUNK) for _ in range(2)],
        "rows": matrix(CHUNK, COLUMNS),
    }
    inputs = {"q": q, "k": k, "v": v, "x": x, "out_bar": out_bar, "gates": gates, "start": final_bar}
    inputs |= {"match_with": states, "origin": start, "bounds": bounds}
    found = run_kernel(name, partial(_retreat_all, plan), out_types, scratch, plan.grid, interpret, inputs)
    dots, matches = found["dots"].sum(0).transpose(0, 2, 1), found["matches"].sum((0, -1))
    return DeltaCotangents(found["rows_bar"], found["v_bar"], found["final"], dots, matches)


def _retreat_all(plan: StateWalk, inputs, outputs, scratch):
    place = plan.place(inputs["bounds"])
    mine = (place.column, place.row, place.head)

    def step(chunk, blocks, state):
        here = (place.row, pl.ds(chunk * CHUNK, CHUNK), place.head, place.columns)
        for row in range(0, plan.inner, 64):
            other = matched(place, chunk, blocks["match_with"], inputs["origin"], row)
            outputs["matches"][*mine, chunk, pl.ds(row, 64)] = sum_columns(kept(scratch, state, row) * other)
        rows_bar = _rows_bar(plan, blocks, scratch)
        plgpu.commit_smem()  # all warps have read `rows`, an operand of that product, overwritten below
        outputs["dots"][*mine, pl.ds(chunk * CHUNK, CHUNK)] = sum_columns(rows_bar * load_matrix(blocks["v"]))
        beta = along_rows(blocks["by_row"].at[FACTOR])
        for buffer, value, target in (
            (scratch["rows"], rows_bar, outputs["rows_bar"]),
            (scratch["scores"], rows_bar * beta, outputs["v_bar"]),
        ):
            buffer[...] = value.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(buffer, target.at[here])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        decay = along_rows(blocks["by_row"].at[TO_END])
        scratch["rows"][...] = (rows_bar * (decay * beta)).astype(jnp.bfloat16)
        blocks["out_bar"][...] = (load_matrix(blocks["out_bar"]) * decay).astype(jnp.bfloat16)
        plgpu.commit_smem()
        after = ()
        for row in range(0, plan.inner, 64):
            q, k = (transposed(blocks[name].at[:, pl.ds(row, 64)]) for name in ("q", "k"))
            read, missed = products((q, blocks["out_bar"]), (k, scratch["rows"]))
            block = kept(scratch, state, row) * blocks["by_row"][WHOLE, 0] + (read * plan.scale - missed)
            after = keep(scratch, after, row, block)
        return after

    arrivals = _arrivals(place, inputs, ("q", "k", "x"), ("v", "out_bar"))
    walk_chunks(place, arrivals, inputs["start"], outputs["final"], scratch, step)


def _rows_bar(plan: StateWalk, blocks, scratch):
    """Returns X^T times the cotangent of the written values."""
    (scores,) = products((blocks["k"], transposed(blocks["q"])))
    gates = (blocks["by_row"], blocks["by_column"])
    decay = decay_between(gates, True, visible(True, False, gates))
    scratch["scores"][...] = (scores * decay).astype(jnp.bfloat16)
    plgpu.commit_smem()
    read, carried = products((scratch["scores"], blocks["out_bar"]), (blocks["k"], scratch["state"]))
    written_bar = read * plan.scale + carried * along_rows(blocks["by_row"].at[SINCE_START])
    scratch["rows"][...] = written_bar.astype(jnp.bfloat16)
    split(scratch["x"], load_matrix(blocks["x"]))
    plgpu.commit_smem()
    (rows_bar,) = products([(transposed(part), scratch["rows"]) for part in scratch["x"]])
    return rows_bar
