"""The states under one gate per channel on GPUs of compute capability 9.0, in two walks along the chunks.

S is the state before a chunk. `channel.prepare` gives the decayed q and k, the scores P and, for the delta rule, X,
beta and the keys as readers r:

    forwards     written = v,  or X beta (v - r S)
                 out = scale (q S + P written),    S <- whole S + k^T written
    backwards    d written = scale P^T d out + k dS,    dR = X^T d written
                 dv = d written,  or beta dR
                 dS <- whole dS + scale q^T d out,  less r^T beta dR

A program owns `COLUMNS` of the V columns of one head's state, so no sum crosses programs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.channel import Prepared
from engrax.pallas_kernels.mosaic_gpu.parts import (
    CHUNK,
    COLUMNS,
    along_rows,
    chunk_block,
    keep,
    kept,
    load_matrix,
    matrix,
    products,
    split,
    state_block,
    sum_columns,
    token_block,
    transposed,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import StateWalk, matched, run_kernel, walk_chunks
from engrax.pallas_kernels.mosaic_gpu.widths import sum_heads


class ChannelStates(NamedTuple):
    """The result of `forward_states`; parts not requested are None."""

    out: Any  # [B, T, HV, V] bfloat16
    final: jax.Array  # [S, HV, K, V] float32
    written: Any  # [B, T, HV, V] bfloat16, for the delta rule
    states: Any  # [B, HV, N, K, V] bfloat16, the state before each chunk
    matches: Any  # [B, HG, N, K] float32, per channel: <what the chunk keeps of that state, match_with>


class ChannelCotangents(NamedTuple):
    """The result of `backward_states`."""

    v: jax.Array  # [B, T, HV, V] bfloat16
    start: jax.Array  # [S, HV, K, V] float32
    states: jax.Array  # [B, HV, N, K, V] bfloat16, the cotangent of the state after each chunk
    rows: Any  # [B, T, HV, V] bfloat16, dR of the delta rule, else None


def forward_states(
    name: str,
    tokens: Prepared,
    v,
    whole,
    start,
    match_with=None,
    *,
    bounds=None,
    scale: float = 1.0,
    beta=None,
    interpret: bool = False,
) -> ChannelStates:
    """Walks forwards and returns the outputs, or the states, the written values and the matches.

    start `[S, HV, K, V]` and bounds: as in `StateWalk.of`. HG heads, a divisor of HV, have the tokens and gates: whole
    `[B, HG, N, K]`, and beta `[B, HG, N, C]` for the delta rule (None: linear attention).
    match_with: the cotangents of the states after each chunk (`ChannelCotangents`) and those of the final states; None:
    return the outputs.
    The matches contribute to the gradient of every gate of a chunk, and their factors grow with the length. So they are
    computed here, where the state is exact.
    """
    walk, shape = StateWalk.of(v.shape[1], start, bounds, scale=scale), jax.ShapeDtypeStruct
    out_types = {"final": shape(start.shape, jnp.float32)}
    inputs = {"k": tokens.k, "v": v, "whole": whole, "start": start, "bounds": bounds}
    if match_with is None:
        inputs |= {"q": tokens.q, "scores": tokens.scores}
        out_types["out"] = shape(v.shape, jnp.bfloat16)
    else:
        inputs["match_with"] = match_with
        out_types["states"] = shape(walk.per_chunk, jnp.bfloat16)
        out_types["matches"] = shape((walk.outer // COLUMNS, *walk.per_chunk[:-1]), jnp.float32)
    if beta is not None:
        inputs |= {"readers": tokens.readers, "inverse": tokens.inverse, "beta": beta}
        if match_with is not None:
            out_types["written"] = shape(v.shape, jnp.bfloat16)
    scratch = _scratch(walk, beta is not None)
    found = run_kernel(name, partial(_advance, walk), out_types, scratch, walk.grid, interpret, inputs)
    if "matches" in found:
        found["matches"] = sum_heads(found["matches"].sum(0), whole.shape[1], axis=1) * whole
    return ChannelStates(**dict.fromkeys(ChannelStates._fields) | found)


def backward_states(
    name: str,
    tokens: Prepared,
    out_bar,
    whole,
    final_bar,
    *,
    scale: float,
    bounds=None,
    beta=None,
    interpret: bool = False,
) -> ChannelCotangents:
    """Walks backwards with the cotangent of the state, which starts as final_bar `[S, HV, K, V]`."""
    walk = StateWalk.of(out_bar.shape[1], final_bar, bounds, scale=scale, reverse=True)
    shape = jax.ShapeDtypeStruct
    out_types = {"v": shape(out_bar.shape, jnp.bfloat16), "final": shape(final_bar.shape, jnp.float32)}
    out_types["states"] = shape(walk.per_chunk, jnp.bfloat16)
    inputs = {"q": tokens.q, "k": tokens.k, "scores": tokens.scores, "v": out_bar, "whole": whole}
    inputs |= {"start": final_bar, "bounds": bounds}
    if beta is not None:
        inputs |= {"readers": tokens.readers, "inverse": tokens.inverse, "beta": beta}
        out_types["rows"] = out_types["v"]
    scratch = _scratch(walk, beta is not None)
    found = run_kernel(name, partial(_retreat, walk), out_types, scratch, walk.grid, interpret, inputs)
    return ChannelCotangents(found["v"], found["final"], found["states"], found.get("rows"))


def _scratch(walk: StateWalk, solves: bool) -> dict:
    return {
        "state": matrix(walk.inner, COLUMNS),
        "exact_state": [],
        "inverse": [matrix(CHUNK, CHUNK) for _ in range(2 if solves else 0)],
        "rows": matrix(CHUNK, COLUMNS),
        "written": matrix(CHUNK, COLUMNS),
    }


def _run(walk: StateWalk, inputs, outputs, scratch, step):
    """Walks with `step(blocks by name, state, send) -> state`; send(buffer, name) stores a chunk's output."""
    place = walk.place(inputs["bounds"])
    arrivals = {"v": token_block(inputs["v"], place, place.row, place.head, COLUMNS, place.column)}
    for name in ("q", "k", "scores", "readers", "inverse"):
        if name in inputs:
            arrivals[name] = token_block(inputs[name], place, place.row, place.head, inputs[name].shape[3])
    for name in ("whole", "beta"):
        if name in inputs:
            arrivals[name] = chunk_block(inputs[name], place)
    if "match_with" in inputs:
        arrivals["match_with"] = state_block(inputs["match_with"][0], place)

    def at(chunk, blocks, state):
        def send(buffer, name):
            target = outputs[name]
            if name == "states":
                target = target.at[place.row, place.head, chunk, :, place.columns]
            else:
                target = target.at[place.row, pl.ds(chunk * CHUNK, CHUNK), place.head, place.columns]
            plgpu.copy_smem_to_gmem(buffer, target)

        if "states" in outputs:
            send(scratch["state"], "states")
        if "matches" in outputs:
            target = outputs["matches"].at[place.column, place.row, place.head, chunk]
            for row in range(0, walk.inner, 64):
                other = matched(place, chunk, blocks["match_with"], inputs["match_with"][1], row)
                target[pl.ds(row, 64)] = sum_columns(kept(scratch, state, row) * other)
        return step(blocks, state, send)

    walk_chunks(place, arrivals, inputs["start"], outputs["final"], scratch, at)


def _advance(walk: StateWalk, inputs, outputs, scratch):
    def step(blocks, state, send):
        written = blocks["v"]
        if "inverse" in blocks:
            written = _solve(blocks, scratch)
            if "written" in outputs:
                send(written, "written")
        if "out" in outputs:
            (out,) = products([(blocks["scores"], written), (blocks["q"], scratch["state"])])
            scratch["rows"][...] = (out * walk.scale).astype(jnp.bfloat16)
            plgpu.commit_smem()
            send(scratch["rows"], "out")
        _make_room()
        after = ()
        for row in range(0, walk.inner, 64):
            (added,) = products((transposed(blocks["k"].at[:, pl.ds(row, 64)]), written))
            after = keep(scratch, after, row, _decayed(scratch, blocks, state, row) + added)
        return after

    _run(walk, inputs, outputs, scratch, step)


def _make_room():
    """Waits until all stores have read their buffers and all threads have arrived."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    plgpu.commit_smem()


def _decayed(scratch, blocks, state, row: int):
    """Returns 64 rows of the state, decayed by the chunk."""
    return kept(scratch, state, row) * along_rows(blocks["whole"].at[pl.ds(row, 64)], COLUMNS)


def _solve(blocks, scratch):
    """Returns the buffer that holds X beta (v - r S)."""
    (read,) = products((blocks["readers"], scratch["state"]))
    missing = load_matrix(blocks["v"]) - read
    scratch["rows"][...] = (missing * along_rows(blocks["beta"])).astype(jnp.bfloat16)
    split(scratch["inverse"], load_matrix(blocks["inverse"]))
    plgpu.commit_smem()
    (written,) = products([(part, scratch["rows"]) for part in scratch["inverse"]])
    scratch["written"][...] = written.astype(jnp.bfloat16)
    plgpu.commit_smem()
    return scratch["written"]


def _retreat(walk: StateWalk, inputs, outputs, scratch):
    def step(blocks, state, send):
        out_bar = blocks["v"]
        read, carried = products((transposed(blocks["scores"]), out_bar), (blocks["k"], scratch["state"]))
        v_bar = read * walk.scale + carried
        if "inverse" in blocks:
            v_bar = _solve_bar(blocks, scratch, v_bar, send)
        scratch["written"][...] = v_bar.astype(jnp.bfloat16)
        plgpu.commit_smem()
        send(scratch["written"], "v")
        _make_room()
        after = ()
        for row in range(0, walk.inner, 64):
            block = _decayed(scratch, blocks, state, row)
            pairs = [(transposed(blocks["q"].at[:, pl.ds(row, 64)]), out_bar)]
            if "inverse" in blocks:
                pairs.append((transposed(blocks["readers"].at[:, pl.ds(row, 64)]), scratch["written"]))
            read, *missed = products(*pairs)
            after = keep(scratch, after, row, block + (read * walk.scale - sum(missed)))
        return after

    _run(walk, inputs, outputs, scratch, step)


def _solve_bar(blocks, scratch, written_bar, send):
    """Returns beta dR; stores dR to global memory."""
    scratch["rows"][...] = written_bar.astype(jnp.bfloat16)
    split(scratch["inverse"], load_matrix(blocks["inverse"]))
    plgpu.commit_smem()
    (rows_bar,) = products([(transposed(part), scratch["rows"]) for part in scratch["inverse"]])
    plgpu.commit_smem()  # all warps have read `rows`, an operand of that product, overwritten below
    scratch["rows"][...] = rows_bar.astype(jnp.bfloat16)
    plgpu.commit_smem()
    send(scratch["rows"], "rows")
    return rows_bar * along_rows(blocks["beta"])
