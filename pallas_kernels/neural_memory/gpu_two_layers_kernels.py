"""Mosaic GPU kernels (sm_90) of a two-layer neural memory: two forward sweeps along the chunks.

The hidden features are split into tiles of 64. Tile h of M(x) = act(x W_1) W_2 consists of 64 columns of W_1 and the
same 64 rows of W_2. A program owns one head from the first chunk to the last, with all its tiles in float32 in SMEM. It
rounds weights to bfloat16 when the matrix unit needs them. Per chunk, with letters as in `gates` and f = act:

    keys     x = f(z), z = anchor k W_1;    e = anchor x W_2 - v;    delta = anchor (e W_2^T) f'(z)
    read     g = f(A q W_1 + B q S_1 - (C q k^T) delta);    out = A g W_2 + B g S_2 - (C g x^T) e
    carry    W_1 <- A_last W_1 + B_last S_1 - k^T C_last delta,    S_1 <- P_last S_1 - k^T E_last delta
             W_2 <- A_last W_2 + B_last S_2 - x^T C_last e,        S_2 <- P_last S_2 - x^T E_last e

Matrices are stored as tiles `[64, 64]`: first the tiles of W_1, then those of W_2; the same for S. If a chunk begins a
segment, the matrices at its start are the reset state instead of the carried one.
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
    MATRIX,
    along_rows,
    load_matrix,
    matrix,
    products,
    tiles,
    token_block,
    transposed,
)
from engrax.pallas_kernels.mosaic_gpu.pipeline import run_kernel
from engrax.pallas_kernels.neural_memory.gpu_kernels import (
    ANCHOR,
    ANCHORS,
    BEGINS,
    LAST,
    LAST_WRITE,
    MATRICES,
    READ_MOMENTUM,
    READ_WEIGHTS,
    RESET,
    TABLE_ROWS,
    WRITE,
    PackedTokens,
    chunk_block,
    reset_inputs,
)
from engrax.pallas_kernels.neural_memory.types import with_derivatives

TILE = 64  # rows and columns of a tile; K and V are one tile each


class TwoLayerSizes(NamedTuple):
    """The static sizes. tiles: number of tiles of the hidden features."""

    batch: int
    heads: int
    chunks: int
    tiles: int
    activation: str
    reverse: bool = False

    def at(self, step):
        """The chunk visited at a step."""
        return self.chunks - 1 - step if self.reverse else step

    @property
    def stages(self) -> int:
        """Number of chunks whose inputs are in SMEM at once; the matrices of two tiles leave room for one."""
        return min(self.chunks, 2 if self.tiles == 1 else 1)

    def tokens(self):
        return jax.ShapeDtypeStruct((self.batch, self.chunks * CHUNK, self.heads, TILE), jnp.bfloat16)

    def matrices(self):
        return jax.ShapeDtypeStruct((self.batch, self.heads, 2 * self.tiles, TILE, TILE), jnp.float32)

    def by_chunk(self, tiles: int, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.chunks, tiles, TILE, TILE), dtype)


def sizes_of(tokens: PackedTokens, tiles: int, activation: str = "", reverse: bool = False) -> TwoLayerSizes:
    """Returns the sizes of a call; reverse: visits the chunks from last to first."""
    batch, length, heads, _ = tokens.k.shape
    return TwoLayerSizes(batch, heads, length // CHUNK, tiles, activation, reverse)


def smem_bytes(key: int, hidden: int, value: int) -> int:
    """Returns the SMEM that a sweep over memories of these features takes, with the inputs of one chunk.

    That is: weights and momentum in float32; in bfloat16 two tiles of operands, x, delta and the read of the hidden
    features, q, k and v; and the table.
    """
    keys, tiles, values = (size // TILE for size in (key, hidden, value))
    exact, rounded = 2 * tiles * (keys + values), 2 + 3 * tiles + 2 * keys + values
    return (4 * exact + 2 * rounded) * TILE * TILE + 4 * TABLE_ROWS * CHUNK


def forward(tokens: PackedTokens, weights, momentum, reset, activation: str, *, interpret: bool = False) -> dict:
    """Returns "out" `[B, T, H, V]` bfloat16 and, as tiles in float32, "weights", "momentum" and "anchor", the weights
    at the start of the row's last chunk that the table says (if none, its values are undefined).

    reset: weights and momentum at the start of chunks that begin a segment, as tiles; None: no segments.
    """
    plan = sizes_of(tokens, weights.shape[2] // 2, activation)
    out_types = {"out": plan.tokens()} | dict.fromkeys(("weights", "momentum", "anchor"), plan.matrices())
    inputs = tokens._asdict() | {"weights": weights, "momentum": momentum} | reset_inputs(reset)
    return _run("neural_memory_forward", plan, _forward_chunk, ("q", "k", "v"), out_types, inputs, interpret)


def states(tokens: PackedTokens, weights, momentum, reset, activation: str, *, interpret: bool = False) -> dict:
    """Recomputes the forward pass without queries. Returns "weights_at" and "momentum_at" at the start of every chunk:
    bfloat16 tiles, followed by their rounding errors, `[B, H, N, 4 tiles, 64, 64]`."""
    plan = sizes_of(tokens, weights.shape[2] // 2, activation)
    out_types = dict.fromkeys(("weights_at", "momentum_at"), plan.by_chunk(4 * plan.tiles, jnp.bfloat16))
    inputs = {"k": tokens.k, "v": tokens.v, "table": tokens.table, "weights": weights, "momentum": momentum}
    inputs |= reset_inputs(reset)
    return _run("neural_memory_backward_states", plan, _states_chunk, ("k", "v"), out_types, inputs, interpret)


def _run(name: str, plan: TwoLayerSizes, step, arriving, out_types: dict, inputs: dict, interpret: bool) -> dict:
    """Runs `step(chunk)` for all chunks of all heads; arriving: the names of the tokens loaded into SMEM."""
    counts = {"left": 1, "right": 1, "x": plan.tiles}
    if "q" in arriving:
        counts |= {"delta": plan.tiles, "read": plan.tiles}
    body, grid = partial(_sweep, plan, counts, step, arriving), (plan.batch, plan.heads, 1)
    scratch = matrices_scratch(plan) | {"tiles": tiles_scratch(counts)}
    return run_kernel(name, body, out_types, scratch, grid, interpret, inputs)


def matrices_scratch(plan: TwoLayerSizes) -> dict:
    """Returns the SMEM scratch for "weights" and "momentum", or their cotangents: tiles in float32."""
    exact = [matrix(TILE, TILE, jnp.float32)] * (2 * plan.tiles)
    return {"weights": exact, "momentum": exact, "matrices_arrived": plgpu.Barrier(num_arrivals=4 * plan.tiles)}


def tiles_scratch(counts: dict):
    """Returns the SMEM scratch for bfloat16 tiles; counts: number of tiles per name (see `TwoLayerChunk.tile`)."""
    return plgpu.SMEM((sum(counts.values()), TILE, TILE), jnp.bfloat16, transforms=tiles(jnp.bfloat16))


class TwoLayerProgram(NamedTuple):
    """A program's position, its inputs and its outputs; all but the numbers are trees of references."""

    batch: jax.Array
    head: jax.Array
    inputs: dict
    outputs: dict
    scratch: dict

    def load(self, name: str, *index):
        """Returns a tile of a per-head input `[B, H, ..., 64, 64]` as a float32 value."""
        return load_global(self.inputs[name].at[self.batch, self.head, *index])

    def store(self, name: str, value, *index):
        """Stores a tile of a per-head output in float32."""
        self.outputs[name].at[self.batch, self.head, *index][...] = value

    def send(self, name: str, tile, *index):
        """Starts storing a tile from SMEM in a per-head output; call `sent` before overwriting the tile."""
        plgpu.copy_smem_to_gmem(tile, self.outputs[name].at[self.batch, self.head, *index])

    def send_tokens(self, name: str, tile, chunk):
        """The same for a chunk's tokens in `[B, T, H, 64]`."""
        plgpu.copy_smem_to_gmem(tile, self.tokens(self.outputs[name], chunk))

    def tokens(self, array, chunk):
        """Returns a reference to the head's tokens of one chunk in `[B, T, H, 64]`."""
        return array.at[self.batch, pl.ds(chunk * CHUNK, CHUNK), self.head]

    def write(self, chunk):
        """Returns C of a chunk, which does not fit into SMEM beside the matrices."""
        return load_global(self.inputs["write"].at[chunk, self.batch, self.head])


class TwoLayerChunk(NamedTuple):
    """A chunk of a program: its number, its part of the table and its other inputs in SMEM.

    counts: number of bfloat16 tiles per name in the scratch "tiles", in order.
    """

    plan: TwoLayerSizes
    place: TwoLayerProgram
    counts: dict
    number: jax.Array
    table: Any
    blocks: dict

    def slot(self, name: str, tile: int = 0) -> int:
        """Returns the position of a bfloat16 tile."""
        names = list(self.counts)
        return sum(self.counts[other] for other in names[: names.index(name)]) + tile

    def tile(self, name: str, tile: int = 0):
        """Returns a bfloat16 tile.

        A zero from the table, unknown to the compiler, is added to the position. Otherwise the compiler precomputes the
        addresses of all tiles, as operands of the matrix unit, and keeps them in half of the registers.
        """
        zero = self.table[LAST, CHUNK - 1].astype(jnp.int32)
        return self.place.scratch["tiles"].at[self.slot(name, tile) + zero]

    def row(self, row: int):
        """Returns a row of the table, one number per token, as a matrix."""
        return along_rows(self.table.at[row])

    def matrix(self, name: str, number: int):
        """Returns a tile of weights or momentum."""
        return load_matrix(self.place.scratch[name][number])

    def tokens(self, name: str):
        """Returns tokens of an input `[B, T, H, 64]` that is not loaded into SMEM."""
        return load_global(self.place.tokens(self.place.inputs[name], self.number))


def load_global(ref):
    """Returns a tile in global memory as a float32 value."""
    return plgpu.load(ref, layout=MATRIX, optimized=False).astype(jnp.float32)


def sent():
    """Waits until all sent tiles have been read."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def put(*pairs):
    """Rounds values into SMEM for the matrix unit; pairs: (target, value)."""
    plgpu.commit_smem()  # all threads' products have read the buffers overwritten below
    for target, value in pairs:
        target[...] = value.astype(jnp.bfloat16)
    plgpu.commit_smem()


def begin(place: TwoLayerProgram):
    """Loads the matrices, or their cotangents, from the inputs "weights" and "momentum"."""
    for name in ("weights", "momentum"):
        for number, tile in enumerate(place.scratch[name]):
            source = place.inputs[name].at[place.batch, place.head, number]
            plgpu.copy_gmem_to_smem(source, tile, place.scratch["matrices_arrived"])
    plgpu.barrier_wait(place.scratch["matrices_arrived"])


def finish(place: TwoLayerProgram):
    """Stores the final matrices to global memory, if requested."""
    plgpu.commit_smem()
    for name in ("weights", "momentum"):
        for number, tile in enumerate(place.scratch[name] if name in place.outputs else ()):
            place.send(name, tile, number)
    plgpu.wait_smem_to_gmem(0)


def _sweep(plan: TwoLayerSizes, counts: dict, step, arriving, inputs, outputs, scratch):
    place = TwoLayerProgram(lax.axis_index("batch"), lax.axis_index("head"), inputs, outputs, scratch)
    begin(place)
    arrivals = {"table": chunk_block(inputs["table"], plan, place.batch, place.head)}
    arrivals |= {name: token_block(inputs[name], plan, place.batch, place.head, TILE) for name in arriving}

    def body(indices, table, *blocks):
        _restart(place, table)
        step(TwoLayerChunk(plan, place, counts, plan.at(indices[0]), table, dict(zip(arriving, blocks))))
        plgpu.commit_smem()  # all threads have read the inputs, new ones may come

    refs, specs = zip(*arrivals.values())
    plgpu.emit_pipeline(body, grid=(plan.chunks,), in_specs=specs, max_concurrent_steps=plan.stages)(*refs)
    finish(place)


def _restart(place: TwoLayerProgram, table):
    """Replaces the matrices by the reset state if the chunk begins a segment."""
    if RESET[0] in place.inputs:

        @pl.when(table[LAST, BEGINS] > 0)
        def _():
            for name, source in zip(MATRICES, RESET):
                for number, tile in enumerate(place.scratch[name]):
                    tile[...] = place.load(source, number)
            plgpu.commit_smem()  # the copy engine sees them, for the anchor


def _forward_chunk(chunk: TwoLayerChunk):
    plan, place = chunk.plan, chunk.place

    @pl.when(chunk.table[LAST, ANCHORS] > 0)
    def _():
        for number, tile in enumerate(place.scratch["weights"]):
            place.send("anchor", tile, number)
        sent()

    _keys(chunk)
    for tile in range(plan.tiles):
        put((chunk.tile("delta", tile), _delta(chunk, tile)))
    put((chunk.tile("right"), _read(chunk)))
    place.send_tokens("out", chunk.tile("right"), chunk.number)
    sent()
    _carry(chunk)


def _states_chunk(chunk: TwoLayerChunk):
    count = 2 * chunk.plan.tiles
    for number in range(count):
        for name in ("weights", "momentum"):
            value = chunk.matrix(name, number)
            rounded = value.astype(jnp.bfloat16)
            put((chunk.tile("left"), rounded), (chunk.tile("right"), value - rounded.astype(jnp.float32)))
            chunk.place.send(f"{name}_at", chunk.tile("left"), chunk.number, number)
            chunk.place.send(f"{name}_at", chunk.tile("right"), chunk.number, count + number)
            sent()
    _keys(chunk)
    _carry(chunk)


def _keys(chunk: TwoLayerChunk):
    """Computes x, and e in the buffer of v."""
    f, _, _ = with_derivatives(chunk.plan.activation)
    for tile in range(chunk.plan.tiles):
        put((chunk.tile("left"), chunk.matrix("weights", tile)))
        (z,) = products((chunk.blocks["k"], chunk.tile("left")))
        put((chunk.tile("x", tile), f(z * chunk.row(ANCHOR))))
    put((chunk.blocks["v"], _error(chunk)))


def _error(chunk: TwoLayerChunk):
    """Returns e. It reloads v, whose buffer holds e."""
    read = 0.0
    for tile in range(chunk.plan.tiles):
        put((chunk.tile("right"), chunk.matrix("weights", chunk.plan.tiles + tile)))
        (part,) = products((chunk.tile("x", tile), chunk.tile("right")))
        read = read + part
    return read * chunk.row(ANCHOR) - chunk.tokens("v")


def _delta(chunk: TwoLayerChunk, tile: int):
    """Returns a tile of delta."""
    _, df, _ = with_derivatives(chunk.plan.activation)
    first, second = (chunk.matrix("weights", number) for number in (tile, chunk.plan.tiles + tile))
    put((chunk.tile("left"), first), (chunk.tile("right"), second))
    pairs = (chunk.blocks["k"], chunk.tile("left")), (chunk.blocks["v"], transposed(chunk.tile("right")))
    z, r = products(*pairs)
    return r * chunk.row(ANCHOR) * df(z * chunk.row(ANCHOR))


def _read(chunk: TwoLayerChunk):
    """Returns the queries' reads; the layers' scores are in the tile "right"."""
    f, _, _ = with_derivatives(chunk.plan.activation)
    hidden = range(chunk.plan.tiles)

    def read(rows, number):
        """Returns the rows' reads from a tile of weights and of momentum."""
        total = 0.0
        for name, row in (("weights", READ_WEIGHTS), ("momentum", READ_MOMENTUM)):
            put((chunk.tile("left"), chunk.matrix(name, number)))
            (part,) = products((rows(), chunk.tile("left")))
            total = total + part * chunk.row(row)
        return total

    (scores,) = products((chunk.blocks["q"], transposed(chunk.blocks["k"])))
    put((chunk.tile("right"), scores * chunk.place.write(chunk.number)))
    for tile in hidden:
        (local,) = products((chunk.tile("right"), chunk.tile("delta", tile)))
        put((chunk.tile("read", tile), f(read(lambda: chunk.blocks["q"], tile) - local)))
    (scores,) = products([(chunk.tile("read", tile), transposed(chunk.tile("x", tile))) for tile in hidden])
    put((chunk.tile("right"), scores * chunk.place.write(chunk.number)))
    (local,) = products((chunk.tile("right"), chunk.blocks["v"]))
    out = sum(read(partial(chunk.tile, "read", tile), chunk.plan.tiles + tile) for tile in hidden)
    return out - local


def _carry(chunk: TwoLayerChunk):
    """Updates weights and momentum to the end of the chunk; recomputes delta and e because registers are scarce."""
    tiles = range(chunk.plan.tiles)
    for tile in tiles:
        _write(chunk, {tile: lambda: chunk.blocks["k"]}, _delta(chunk, tile))
    _write(chunk, {chunk.plan.tiles + tile: partial(chunk.tile, "x", tile) for tile in tiles}, _error(chunk))


def _write(chunk: TwoLayerChunk, inputs: dict, delta):
    """Writes tokens into tiles of weights and momentum. inputs: the layer's inputs by tile number; delta: the gradient
    of its outputs."""
    put((chunk.tile("left"), delta * chunk.row(WRITE)), (chunk.tile("right"), delta * chunk.row(LAST_WRITE)))
    for number, x in inputs.items():
        weights, momentum = (chunk.place.scratch[name][number] for name in ("weights", "momentum"))
        (written,) = products((transposed(x()), chunk.tile("left")))
        of_momentum = load_matrix(momentum) * chunk.table[LAST, 1] - written
        weights[...] = load_matrix(weights) * chunk.table[LAST, 0] + of_momentum
        (written,) = products((transposed(x()), chunk.tile("right")))
        momentum[...] = load_matrix(momentum) * chunk.table[LAST, 2] - written
