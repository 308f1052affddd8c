"""Mosaic GPU kernels (sm_90) of a one-layer neural memory: three sweeps along the chunks.

With one layer, M(x) = x W, so the columns of W, of its momentum S and of v are independent. A program of a sweep owns
`COLUMNS` columns of one head, from the first chunk to the last. Per chunk, with M = W at its start and letters as in
`gates`:

    forward     delta = anchor k M - v,    out = A q M + B q S - (C q k^T) delta
                M <- A_last M + B_last S - k^T C_last delta,    S <- P_last S - k^T E_last delta
    backward    d delta = -(C q k^T)^T d out - C_last k dM - E_last k dS
                dM <- A_last dM + q^T A d out + k^T anchor d delta,    dS <- B_last dM + P_last dS + q^T B d out

The other gradients need only the results of these sweeps from other chunks (`gpu_chunks`).

If a chunk begins a segment, M and S at its start are the reset state instead of the carried one, and their cotangents
are added to those of the reset state; none goes to the chunk before.

Matrices are float32, in SMEM or in registers, and are rounded to bfloat16 for the matrix unit.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import (
    CHUNK,
    COLUMNS,
    MATRIX,
    along_rows,
    keep,
    kept,
    load_matrix,
    matrix,
    products,
    sum_columns,
    tiles,
    token_block,
    transposed,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import run_kernel

# Rows of a chunk's table: A, B, the anchor's scale, C and E of the last slot. The last row has A, B and P of the last
# slot and then two flags, 0 or 1: the chunk begins a segment; its first weights are the row's final anchor.
READ_WEIGHTS, READ_MOMENTUM, ANCHOR, WRITE, LAST_WRITE, LAST = range(6)
BEGINS, ANCHORS = 3, 4
TABLE_ROWS = 6
MATRICES = ("weights", "momentum")
RESET = ("reset_weights", "reset_momentum")


class PackedTokens(NamedTuple):
    """The kernels' inputs; T is a multiple of `CHUNK`."""

    q: jax.Array  # [B, T, H, K] bfloat16
    k: jax.Array  # [B, T, H, K] bfloat16
    v: jax.Array  # [B, T, H, V] bfloat16
    write: jax.Array  # [N, B, H, C, C] float32, C of `gates`
    table: jax.Array  # [N, B, H, 6, C] float32


class MemorySizes(NamedTuple):
    """The static sizes. segments: chunks may begin with the reset state."""

    batch: int
    heads: int
    chunks: int
    key: int
    value: int
    segments: bool
    reverse: bool = False

    def at(self, step):
        """The chunk visited at a step."""
        return self.chunks - 1 - step if self.reverse else step

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.value // COLUMNS

    def tokens(self, features: int):
        return jax.ShapeDtypeStruct((self.batch, self.chunks * CHUNK, self.heads, features), jnp.bfloat16)

    def matrices(self):
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.key, self.value), jnp.float32)

    def states(self):
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, self.key, self.value), jnp.bfloat16)


def sizes_of(tokens: PackedTokens, segments: bool = False, reverse: bool = False) -> MemorySizes:
    """Returns the sizes of a call; reverse: visits the chunks from last to first."""
    batch, length, heads, key = tokens.k.shape
    return MemorySizes(batch, heads, length // CHUNK, key, tokens.v.shape[3], segments, reverse)


def reset_inputs(reset) -> dict:
    """Returns the inputs that hold the reset state; none without segments."""
    return {} if reset is None else dict(zip(RESET, reset))


def forward(tokens: PackedTokens, weights, momentum, reset=None, *, interpret: bool = False) -> dict:
    """Returns "out" `[B, T, H, V]` bfloat16 and, `[B, H, K, V]` float32, "weights", "momentum" and "anchor", the
    weights at the start of the row's last chunk that the table says (if none, its values are undefined).

    reset: weights and momentum at the start of chunks that begin a segment, `[B, H, K, V]`; None: no segments.
    """
    plan = sizes_of(tokens, reset is not None)
    out_types = {"out": plan.tokens(plan.value)} | dict.fromkeys(("weights", "momentum", "anchor"), plan.matrices())
    inputs = tokens._asdict() | {"weights": weights, "momentum": momentum} | reset_inputs(reset)
    body = partial(_sweep, plan, _forward_chunk, ("q", "k"), ("v",))
    return run_kernel("neural_memory_forward", body, out_types, _scratch(plan), plan.grid, interpret, inputs)


def states(tokens: PackedTokens, weights, momentum, reset=None, *, interpret: bool = False) -> dict:
    """Recomputes the forward pass. Returns bfloat16 arrays: "delta" and its rounding error "rest", `[B, T, H, V]`, and
    "weights_at" and "momentum_at" at the start of every chunk, `[B, H, N, K, V]`, with their rounding errors
    "weights_rest" and "momentum_rest"."""
    plan = sizes_of(tokens, reset is not None)
    out_types = dict.fromkeys(("delta", "rest"), plan.tokens(plan.value))
    out_types |= dict.fromkeys((f"{name}_{part}" for name in MATRICES for part in ("at", "rest")), plan.states())
    inputs = {"k": tokens.k, "v": tokens.v, "table": tokens.table, "weights": weights, "momentum": momentum}
    inputs |= reset_inputs(reset)
    body = partial(_sweep, plan, _states_chunk, ("k",), ("v",))
    scratch = _scratch(plan) | {"rest": {name: matrix(plan.key, COLUMNS) for name in MATRICES}}
    return run_kernel("neural_memory_backward_states", body, out_types, scratch, plan.grid, interpret, inputs)


def backward(
    tokens: PackedTokens, again: dict, out_bar, bars, segments: bool = False, *, interpret: bool = False
) -> dict:
    """Runs the cotangents of the matrices backwards. bars: the cotangents of `forward`'s weights, momentum and anchor;
    again: the results of `states`. segments: chunks may begin with the reset state.

    Returns "v_bar" `[B, T, H, V]` bfloat16; the cotangents at the end of every chunk, "weights_at" and "momentum_at"
    `[B, H, N, K, V]` bfloat16; the cotangents of the initial "weights" and "momentum", and with segments those of the
    reset state, "reset_weights" and "reset_momentum", `[B, H, K, V]` float32; and
    "matches" `[N, B, H, 3]`, the inner products of the matrices with their cotangents, which are the cotangents of A, B
    and P of the last slot.
    """
    plan = sizes_of(tokens, segments, reverse=True)
    out_types = {"v_bar": plan.tokens(plan.value)} | dict.fromkeys(("weights_at", "momentum_at"), plan.states())
    out_types |= dict.fromkeys((*MATRICES, *(RESET if segments else ())), plan.matrices())
    matches = (plan.value // COLUMNS, plan.chunks, plan.batch, plan.heads, 3, plan.key)
    out_types["matches"] = jax.ShapeDtypeStruct(matches, jnp.float32)
    inputs = tokens._asdict() | dict(zip(("weights", "momentum", "anchor"), bars)) | {"out_bar": out_bar}
    inputs |= {name: again[name] for name in again if name.startswith(MATRICES)}
    del inputs["v"]
    body = partial(_sweep, plan, _backward_chunk, ("q", "k"), ("out_bar",))
    scratch = _scratch(plan)
    found = run_kernel("neural_memory_backward_carry", body, out_types, scratch, plan.grid, interpret, inputs)
    return found | {"matches": found["matches"].sum((0, -1))}


def _scratch(plan: MemorySizes) -> dict:
    def state(exact: bool):
        exact_state = [matrix(plan.key, COLUMNS, jnp.float32)] if exact else []
        return {"state": matrix(plan.key, COLUMNS), "exact_state": exact_state}

    # Beside a chunk's values, the registers can hold one matrix of 64 rows, but not of 128. With segments they hold
    # none, so that what replaces the matrices is a branch without values.
    exact_momentum = plan.key > 64 or plan.segments
    return {"weights": state(True), "momentum": state(exact_momentum), "square": matrix(CHUNK, CHUNK)}


class MemoryProgram(NamedTuple):
    """A program's position, its inputs and its outputs; all but the numbers are trees of references."""

    batch: jax.Array
    head: jax.Array
    column: jax.Array
    inputs: dict
    outputs: dict
    scratch: dict

    @property
    def columns(self):
        return pl.ds(self.column * COLUMNS, COLUMNS)

    def matrix(self, array, row: int):
        return array.at[self.batch, self.head, pl.ds(row, 64), self.columns]

    def load(self, name: str, row: int):
        return plgpu.load(self.matrix(self.inputs[name], row), layout=MATRIX, optimized=False)

    def load_at(self, name: str, chunk, row: int):
        """Returns the sum of a per-chunk matrix and its rounding error."""

        def load(part: str):
            place = self.inputs[f"{name}_{part}"].at[self.batch, self.head, chunk, pl.ds(row, 64), self.columns]
            return plgpu.load(place, layout=MATRIX, optimized=False).astype(jnp.float32)

        return load("at") + load("rest")

    def tokens(self, array, chunk):
        return array.at[self.batch, pl.ds(chunk * CHUNK, CHUNK), self.head, self.columns]

    def send_matrices(self, chunk, part: str, buffers: dict):
        """Stores matrices to their chunk's place in global memory."""
        for name, buffer in buffers.items():
            target = self.outputs[f"{name}_{part}"].at[self.batch, self.head, chunk, :, self.columns]
            plgpu.copy_smem_to_gmem(buffer, target)

    @property
    def rounded(self) -> dict:
        return {name: self.scratch[name]["state"] for name in MATRICES}


def _sweep(plan: MemorySizes, step, full, columns, inputs, outputs, scratch):
    """Runs `step(plan, place, chunk, blocks by name, momentum) -> momentum` over all chunks.

    full, columns: the token arrays loaded with all features, and with only the program's columns.
    """
    place = MemoryProgram(*(lax.axis_index(name) for name in ("batch", "head", "part")), inputs, outputs, scratch)
    momentum = _begin(plan, place)

    def body(indices, *blocks_and_momentum):
        *blocks, momentum = blocks_and_momentum
        momentum = step(plan, place, plan.at(indices[0]), dict(zip(arrivals, blocks)), momentum)
        plgpu.commit_smem()  # the matrix unit now sees the state; all threads have read the inputs, new ones may come
        return momentum

    batch, head, column, *_ = place
    arrivals = {n: token_block(inputs[n], plan, batch, head, inputs[n].shape[3]) for n in full}
    arrivals |= {n: token_block(inputs[n], plan, batch, head, COLUMNS, column) for n in columns}
    for name in ("write", "table"):
        if name in inputs:
            arrivals[name] = chunk_block(inputs[name], plan, batch, head)
    refs, specs = zip(*arrivals.values())
    pipeline = plgpu.emit_pipeline(
        body,
        grid=(plan.chunks,),
        in_specs=specs,
        max_concurrent_steps=min(2, plan.chunks),
        init_carry=momentum,
    )
    _finish(plan, place, pipeline(*refs))


def chunk_block(array, sweep, batch, head):
    """Returns a reference to one head's part of `[N, B, H, R, C]` and the block spec that loads it chunk by chunk.

    sweep: has `at(step)`, the chunk visited at a step.
    """
    transforms = tiles(array.dtype) if array.shape[3] == CHUNK else ()
    spec = plgpu.BlockSpec((None, *array.shape[3:]), lambda step: (sweep.at(step), 0, 0), transforms=transforms)
    return array.at[:, batch, head], spec


def _begin(plan: MemorySizes, place: MemoryProgram) -> tuple:
    """Loads the matrices. Returns the part of the momentum that is kept in registers."""
    momentum = ()
    for row in range(0, plan.key, 64):
        weights, block = (place.load(name, row) for name in ("weights", "momentum"))
        keep(place.scratch["weights"], (), row, weights)
        momentum = keep(place.scratch["momentum"], momentum, row, block)
        for name in RESET if plan.reverse and plan.segments else ():
            place.matrix(place.outputs[name], row)[...] = jnp.zeros((64, COLUMNS), jnp.float32)
    plgpu.commit_smem()
    return momentum


def _restart(plan: MemorySizes, place: MemoryProgram, table):
    """Replaces the matrices by the reset state if the chunk begins a segment."""
    if plan.segments:

        @pl.when(table[LAST, BEGINS] > 0)
        def _():
            for row in range(0, plan.key, 64):
                for name, source in zip(MATRICES, RESET):
                    keep(place.scratch[name], (), row, place.load(source, row))
            plgpu.commit_smem()


def _end_restart(plan: MemorySizes, place: MemoryProgram, table):
    """The derivative of `_restart`: moves the matrices' cotangents to the reset state."""
    if plan.segments:

        @pl.when(table[LAST, BEGINS] > 0)
        def _():
            for row in range(0, plan.key, 64):
                for name, target in zip(MATRICES, RESET):
                    total = place.matrix(place.outputs[target], row)
                    so_far = plgpu.load(total, layout=MATRIX, optimized=False)
                    total[...] = so_far + kept(place.scratch[name], (), row)
            plgpu.commit_smem()  # zeros may be stored by other threads than those that read
            for row in range(0, plan.key, 64):
                for name in MATRICES:
                    keep(place.scratch[name], (), row, jnp.zeros((64, COLUMNS), jnp.float32))


def _finish(plan: MemorySizes, place: MemoryProgram, momentum: tuple):
    """Stores the final matrices to global memory, if requested."""
    if "weights" in place.outputs:
        for row in range(0, plan.key, 64):
            place.matrix(place.outputs["weights"], row)[...] = kept(place.scratch["weights"], (), row)
            place.matrix(place.outputs["momentum"], row)[...] = kept(place.scratch["momentum"], momentum, row)
    plgpu.wait_smem_to_gmem(0)


def _forward_chunk(plan: MemorySizes, place: MemoryProgram, chunk, blocks, momentum):
    outputs, scratch = place.outputs, place.scratch
    _restart(plan, place, blocks["table"])

    @pl.when(blocks["table"][LAST, ANCHORS] > 0)
    def _():
        for row in range(0, plan.key, 64):
            place.matrix(outputs["anchor"], row)[...] = kept(scratch["weights"], (), row)

    delta = _delta(blocks, scratch)
    blocks["v"][...] = delta.astype(jnp.bfloat16)
    _scores(blocks, scratch["square"])
    out = _read(blocks["q"], blocks["table"], scratch, READ_WEIGHTS, READ_MOMENTUM)
    (local,) = products((scratch["square"], blocks["v"]))
    scratch["square"][...] = (out - local).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(scratch["square"], place.tokens(outputs["out"], chunk))
    return _carry(plan, blocks, scratch, momentum, delta)


def _states_chunk(plan: MemorySizes, place: MemoryProgram, chunk, blocks, momentum):
    _restart(plan, place, blocks["table"])
    for row in range(0, plan.key, 64):
        rows = pl.ds(row, 64), slice(None)
        for name, values in (("weights", ()), ("momentum", momentum)):
            rest = kept(place.scratch[name], values, row) - load_matrix(place.rounded[name].at[rows])
            place.scratch["rest"][name][rows] = rest.astype(jnp.bfloat16)
    plgpu.commit_smem()
    place.send_matrices(chunk, "at", place.rounded)
    place.send_matrices(chunk, "rest", place.scratch["rest"])
    delta = _delta(blocks, place.scratch)
    rounded = delta.astype(jnp.bfloat16)
    blocks["v"][...] = rounded
    place.scratch["square"][...] = (delta - rounded.astype(jnp.float32)).astype(jnp.bfloat16)
    plgpu.commit_smem()
    for name, source in (("delta", blocks["v"]), ("rest", place.scratch["square"])):
        plgpu.copy_smem_to_gmem(source, place.tokens(place.outputs[name], chunk))
    return _carry(plan, blocks, place.scratch, momentum, delta)


def _delta(blocks, scratch):
    """Returns the anchor's error on the values."""
    (read,) = products((blocks["k"], scratch["weights"]["state"]))
    return read * along_rows(blocks["table"].at[ANCHOR]) - load_matrix(blocks["v"])


def _scores(blocks, target):
    """Stores C q k^T in the target."""
    (scores,) = products((blocks["q"], transposed(blocks["k"])))
    target[...] = (scores * load_matrix(blocks["write"])).astype(jnp.bfloat16)
    plgpu.commit_smem()


def _read(tokens, table, scratch, of_weights: int, of_momentum: int):
    """Returns the tokens' reads from weights and momentum, each times its row of the table."""
    by_weights, by_momentum = products(*((tokens, scratch[name]["state"]) for name in ("weights", "momentum")))
    return by_weights * along_rows(table.at[of_weights]) + by_momentum * along_rows(table.at[of_momentum])


def _carry(plan: MemorySizes, blocks, scratch, momentum, delta):
    """Updates weights and momentum to the end of the chunk, in buffers already stored. Returns the momentum."""
    table, after = blocks["table"], ()
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    scratch["square"][...] = (delta * along_rows(table.at[WRITE])).astype(jnp.bfloat16)
    blocks["v"][...] = (delta * along_rows(table.at[LAST_WRITE])).astype(jnp.bfloat16)
    plgpu.commit_smem()
    for row in range(0, plan.key, 64):
        k = transposed(blocks["k"].at[:, pl.ds(row, 64)])
        to_weights, to_momentum = products((k, scratch["square"]), (k, blocks["v"]))
        w, s = kept(scratch["weights"], (), row), kept(scratch["momentum"], momentum, row)
        keep(scratch["weights"], (), row, w * table[LAST, 0] + s * table[LAST, 1] - to_weights)
        after = keep(scratch["momentum"], after, row, s * table[LAST, 2] - to_momentum)
    return after


def _backward_chunk(plan: MemorySizes, place: MemoryProgram, chunk, blocks, momentum):
    """Here `weights` and `momentum` are the cotangents of the matrices."""
    scratch, table, out_bar = place.scratch, blocks["table"], blocks["out_bar"]
    square = scratch["square"]
    place.send_matrices(chunk, "at", place.rounded)
    _matches(plan, place, chunk, momentum)
    _scores(blocks, square)
    v_bar = _read(blocks["k"], table, scratch, WRITE, LAST_WRITE)
    (local,) = products((transposed(square), out_bar))
    v_bar, read_bar = v_bar + local, load_matrix(out_bar)
    plgpu.commit_smem()  # all threads' products have read the buffers overwritten below
    square[...] = v_bar.astype(jnp.bfloat16)
    out_bar[...] = (read_bar * along_rows(table.at[READ_MOMENTUM])).astype(jnp.bfloat16)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(square, place.tokens(place.outputs["v_bar"], chunk))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    after = ()
    for row in range(0, plan.key, 64):
        (to_momentum,) = products((transposed(blocks["q"].at[:, pl.ds(row, 64)]), out_bar))
        w, s = kept(scratch["weights"], (), row), kept(scratch["momentum"], momentum, row)
        after = keep(scratch["momentum"], after, row, w * table[LAST, 1] + s * table[LAST, 2] + to_momentum)
    plgpu.commit_smem()
    square[...] = (v_bar * -along_rows(table.at[ANCHOR])).astype(jnp.bfloat16)
    out_bar[...] = (read_bar * along_rows(table.at[READ_WEIGHTS])).astype(jnp.bfloat16)
    plgpu.commit_smem()
    for row in range(0, plan.key, 64):
        q, k = (transposed(blocks[name].at[:, pl.ds(row, 64)]) for name in ("q", "k"))
        (to_weights,) = products([(q, out_bar), (k, square)])
        keep(scratch["weights"], (), row, kept(scratch["weights"], (), row) * table[LAST, 0] + to_weights)

    @pl.when(table[LAST, ANCHORS] > 0)
    def _():
        for row in range(0, plan.key, 64):
            keep(scratch["weights"], (), row, kept(scratch["weights"], (), row) + place.load("anchor", row))

    _end_restart(plan, place, table)
    return after


def _matches(plan: MemorySizes, place: MemoryProgram, chunk, momentum):
    """Stores the row-wise inner products of the matrices with their cotangents.

    These sums have cancellation, so they need the matrices in more than bfloat16.
    """
    target = place.outputs["matches"].at[place.column, chunk, place.batch, place.head]
    for row in range(0, plan.key, 64):
        w, s = (place.load_at(name, chunk, row) for name in MATRICES)
        w_bar, s_bar = kept(place.scratch["weights"], (), row), kept(place.scratch["momentum"], momentum, row)
        for number, product in enumerate((w_bar * w, w_bar * s, s_bar * s)):
            target[number, pl.ds(row, 64)] = sum_columns(product)
