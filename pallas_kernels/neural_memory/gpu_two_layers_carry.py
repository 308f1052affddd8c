"""The Mosaic GPU kernel (sm_90) that carries the cotangents of a two-layer memory's matrices backwards.

A program owns one head. The cotangents dW and dS at a chunk's end stay in SMEM in float32. `gpu_two_layers_reads` gives
the other values of the chunk; "..." are the terms from the reads:

    d delta = ... - C_last k dW_1 - E_last k dS_1,    dr = d delta f'(z)
    de = ... - C_last x dW_2 - E_last x dS_2 + anchor dr W_2,    dv = -de
    dx = ... - C_last e dW_2^T - E_last e dS_2^T + anchor de W_2^T
    dz = d delta r f''(z) + dx f'(z)
    dk = ... - C_last delta dW_1^T - E_last delta dS_1^T + anchor dz W_1^T

    dS_1 <- B_last dW_1 + P_last dS_1 + q^T B dy,     dW_1 <- A_last dW_1 + q^T A dy + k^T anchor dz
    dS_2 <- B_last dW_2 + P_last dS_2 + g^T B d out,  dW_2 <- A_last dW_2 + g^T A d out + x^T anchor de + dr^T anchor e

The cotangents of the coefficients are inner products: of rows with the terms above, and of matrices with their
cotangents. If a chunk begins a segment, dW and dS at its start are added to the cotangents of the reset state; none
goes to the chunk before.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, load_matrix, products, sum_columns, transposed
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
)
from engrax.pallas_kernels.neural_memory.gpu_two_layers_kernels import (
    TILE,
    TwoLayerChunk,
    TwoLayerProgram,
    TwoLayerSizes,
    begin,
    finish,
    load_global,
    matrices_scratch,
    put,
    sent,
    sizes_of,
    tiles_scratch,
)
from engrax.pallas_kernels.neural_memory.gpu_two_layers_reads import (
    BEND,
    DELTA,
    DELTA_BAR,
    ERROR,
    ERROR_BAR,
    K_BAR,
    READ,
    READ_BAR,
    SLOPE,
    X_BAR,
    X,
    exact_tile,
)

# Rows of "rows_bar": per quantity, one row per tile of the matrices; then one more row of the first quantity.
OF_ANCHOR, OF_C, OF_E, OF_A, OF_B, OF_P = range(6)
QUANTITIES = 6
_STATES = ("weights_at", "momentum_at")
_ROOMS = {"k_bar": 0, "error_bar": 1, "z_bar": 2}
_WRITES = ((OF_C, WRITE, "weights"), (OF_E, LAST_WRITE, "momentum"))


def carry_gradients(
    tokens: PackedTokens, again: dict, reads: dict, out_bar, bars, segments: bool, *, interpret: bool = False
) -> dict:
    """Returns the cotangents "k_bar" and "error_bar" (minus that of v), `[B, T, H, 64]` bfloat16; those of the initial
    "weights" and "momentum", and with segments those of the reset state, "reset_weights" and "reset_momentum", tiles in
    float32; and "rows_bar" `[N, B, H, 6, C]`: the cotangents of the anchor's scale
    and of C and E of the last slot, then three rows whose sums are the cotangents of A, B and P of the last slot.

    again, reads: the results of `states` and `read_gradients`. bars: the cotangents of `forward`'s weights, momentum
    and anchor. segments: chunks may begin with the reset state.
    """
    plan = sizes_of(tokens, bars[0].shape[2] // 2, reverse=True)
    lead, count = (plan.chunks, plan.batch, plan.heads), QUANTITIES * 2 * plan.tiles
    rows = jax.ShapeDtypeStruct((*lead, count + 1, CHUNK), jnp.float32)
    out_types = dict.fromkeys(("k_bar", "error_bar"), plan.tokens()) | {"rows_bar": rows}
    out_types |= dict.fromkeys((*MATRICES, *(RESET if segments else ())), plan.matrices())
    out_types["room"] = jax.ShapeDtypeStruct((plan.batch, plan.heads, 2 + plan.tiles, TILE, TILE), jnp.float32)
    inputs = {"q": tokens.q, "k": tokens.k, "table": tokens.table, "out_bar": out_bar, **again}
    inputs |= dict(zip(("weights", "momentum", "anchor"), bars))
    inputs |= {name: reads[name] for name in ("exact", "rounded")}
    scratch = matrices_scratch(plan) | {
        "tiles": tiles_scratch(_counts(plan)),
        "table": plgpu.SMEM((TABLE_ROWS, CHUNK), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=2 + 3 * plan.tiles),
        "read_arrived": plgpu.Barrier(num_arrivals=plan.tiles),
        "q_arrived": plgpu.Barrier(num_arrivals=1),
    }
    grid = (plan.batch, plan.heads, 1)
    body = partial(_sweep, plan)
    found = run_kernel("neural_memory_backward_carry", body, out_types, scratch, grid, interpret, inputs)
    rows = found["rows_bar"][..., :count, :].reshape(*lead, QUANTITIES, 2 * plan.tiles, CHUNK).sum(-2)
    return found | {"rows_bar": rows.at[..., OF_ANCHOR, :].add(found["rows_bar"][..., count, :])}


def _counts(plan: TwoLayerSizes) -> dict:
    single = dict.fromkeys(("k", "error", "left"), 1)
    return single | dict.fromkeys(("first", "second", "x", "r_bar"), plan.tiles)


class CarryChunk(TwoLayerChunk):
    """A chunk that loads k, x and the tiles of W_1 ("first") and W_2 ("second") at its start."""

    def exact(self, quantity: int, tile: int | None = None):
        """Returns a float32 tile from `read_gradients`."""
        found = quantity if tile is None else exact_tile(self.plan, quantity, tile)
        return self.place.load("exact", self.number, found)

    def keep(self, name: str, value, tile: int = 0):
        """Stores a tile in global memory in float32.

        Sums that grow from tile to tile are stored and reloaded. Otherwise the compiler keeps all terms in registers.
        """
        self.place.store("room", value, _ROOMS[name] + tile)

    def kept(self, name: str, tile: int = 0):
        return load_global(self.place.outputs["room"].at[self.place.batch, self.place.head, _ROOMS[name] + tile])

    def add_row(self, quantity: int, number: int, value):
        """Stores a row of "rows_bar"."""
        target = self.place.outputs["rows_bar"].at[self.number, self.place.batch, self.place.head]
        target[quantity * 2 * self.plan.tiles + number] = value


def _sweep(plan: TwoLayerSizes, inputs, outputs, scratch):
    place = TwoLayerProgram(lax.axis_index("batch"), lax.axis_index("head"), inputs, outputs, scratch)
    begin(place)
    for name in RESET if RESET[0] in outputs else ():
        for number in range(2 * plan.tiles):
            place.store(name, jnp.zeros((TILE, TILE), jnp.float32), number)

    def step(step, carry):
        _chunk(CarryChunk(plan, place, _counts(plan), plan.at(step), scratch["table"], {}))
        plgpu.commit_smem()  # all threads have read the inputs, new ones may come
        return carry

    lax.fori_loop(0, plan.chunks, step, 0)
    finish(place)


def _fetch(chunk: CarryChunk):
    place, arrived = chunk.place, chunk.place.scratch["arrived"]
    weights, x = (place.inputs[name].at[place.batch, place.head, chunk.number] for name in ("weights_at", "rounded"))
    copies = {("k", 0): place.tokens(place.inputs["k"], chunk.number)}
    for tile in range(chunk.plan.tiles):
        copies |= {("first", tile): weights.at[tile], ("second", tile): weights.at[chunk.plan.tiles + tile]}
        copies |= {("x", tile): x.at[X * chunk.plan.tiles + tile]}
    for name, source in copies.items():
        plgpu.copy_gmem_to_smem(source, place.scratch["tiles"].at[chunk.slot(*name)], arrived)
    plgpu.copy_gmem_to_smem(place.inputs["table"].at[chunk.number, place.batch, place.head], chunk.table, arrived)
    plgpu.barrier_wait(arrived)


def _chunk(chunk: CarryChunk):
    place = chunk.place
    _fetch(chunk)
    _matches(chunk)
    put((chunk.tile("error"), chunk.exact(ERROR)))
    _of_deltas(chunk)
    _of_errors(chunk)
    _of_keys(chunk)
    _update_second(chunk)
    _update_first(chunk)

    @pl.when(chunk.table[LAST, ANCHORS] > 0)
    def _():
        for tile, target in enumerate(place.scratch["weights"]):
            target[...] = load_matrix(target) + place.load("anchor", tile)

    _end_restart(chunk)


def _end_restart(chunk: CarryChunk):
    """Moves the matrices' cotangents to the reset state if the chunk begins a segment."""
    place = chunk.place
    if RESET[0] in place.outputs:

        @pl.when(chunk.table[LAST, BEGINS] > 0)
        def _():
            for name, target in zip(MATRICES, RESET):
                for number, tile in enumerate(place.scratch[name]):
                    so_far = load_global(place.outputs[target].at[place.batch, place.head, number])
                    place.store(target, so_far + load_matrix(tile), number)
            plgpu.commit_smem()  # zeros may be stored by other threads than those that read
            for tile in (*place.scratch["weights"], *place.scratch["momentum"]):
                tile[...] = jnp.zeros((TILE, TILE), jnp.float32)


def _matches(chunk: CarryChunk):
    """Stores the row-wise inner products of the matrices with their cotangents, for A, B and P of the last slot.

    These sums have cancellation, so they need the matrices in more than bfloat16.
    """
    count = 2 * chunk.plan.tiles
    for number in range(count):
        parts = [[chunk.place.load(name, chunk.number, at) for at in (number, count + number)] for name in _STATES]
        w, s = (rounded + rest for rounded, rest in parts)
        for quantity, name, matrix in ((OF_A, "weights", w), (OF_B, "weights", s), (OF_P, "momentum", s)):
            chunk.add_row(quantity, number, sum_columns(chunk.matrix(name, number) * matrix))


def _of_deltas(chunk: CarryChunk):
    """Computes dr, and the parts of dz and dk from d delta and delta; stores the parts of dC and dE.

    Each cotangent is rounded twice, for dk and for d delta, since registers cannot hold both sums.
    """
    for tile in range(chunk.plan.tiles):
        put((chunk.tile("r_bar", tile), chunk.exact(DELTA, tile)))  # temporarily
        k_bar = chunk.kept("k_bar") if tile else chunk.exact(K_BAR)
        for _, row, name in _WRITES:
            put((chunk.tile("left"), chunk.matrix(name, tile)))
            (part,) = products((chunk.tile("r_bar", tile), transposed(chunk.tile("left"))))
            k_bar = k_bar - part * chunk.row(row)
        chunk.keep("k_bar", k_bar)
        delta_bar = chunk.exact(DELTA_BAR, tile)
        for quantity, row, name in _WRITES:
            put((chunk.tile("left"), chunk.matrix(name, tile)))
            (part,) = products((chunk.tile("k"), chunk.tile("left")))
            chunk.add_row(quantity, tile, -sum_columns(part * chunk.exact(DELTA, tile)))
            delta_bar = delta_bar - part * chunk.row(row)
        chunk.keep("z_bar", delta_bar * chunk.exact(BEND, tile), tile)
        put((chunk.tile("r_bar", tile), delta_bar * chunk.exact(SLOPE, tile)))


def _of_errors(chunk: CarryChunk):
    """Computes de in the tile "left" and anchor de in the buffer of e; adds the carry's part through x to dz.

    Stores -dv, the rest of dC and dE, and the part of the anchor's scale from r.
    """
    for tile in range(chunk.plan.tiles):
        x_bar = chunk.exact(X_BAR, tile)
        for _, row, name in _WRITES:
            put((chunk.tile("left"), chunk.matrix(name, chunk.plan.tiles + tile)))
            (part,) = products((chunk.tile("error"), transposed(chunk.tile("left"))))
            x_bar = x_bar - part * chunk.row(row)
        chunk.keep("z_bar", chunk.kept("z_bar", tile) + x_bar * chunk.exact(SLOPE, tile), tile)
    for tile in range(chunk.plan.tiles):
        number, error_bar = chunk.plan.tiles + tile, chunk.kept("error_bar") if tile else chunk.exact(ERROR_BAR)
        for quantity, row, name in _WRITES:
            put((chunk.tile("left"), chunk.matrix(name, number)))
            (part,) = products((chunk.tile("x", tile), chunk.tile("left")))
            chunk.add_row(quantity, number, -sum_columns(part * chunk.exact(ERROR)))
            error_bar = error_bar - part * chunk.row(row)
        (part,) = products((chunk.tile("r_bar", tile), chunk.tile("second", tile)))
        chunk.add_row(OF_ANCHOR, tile, sum_columns(part * chunk.exact(ERROR)))
        chunk.keep("error_bar", error_bar + part * chunk.row(ANCHOR))
    plgpu.commit_smem()  # values stored by other threads are visible
    error_bar = chunk.kept("error_bar")
    put((chunk.tile("left"), error_bar), (chunk.tile("error"), error_bar * chunk.row(ANCHOR)))
    chunk.place.send_tokens("error_bar", chunk.tile("left"), chunk.number)


def _of_keys(chunk: CarryChunk):
    """Computes anchor dz in the buffer of W_2; stores dk and the rest of the cotangent of the anchor's scale."""
    tiles = range(chunk.plan.tiles)
    for tile in tiles:
        (by_anchor,) = products((chunk.tile("left"), transposed(chunk.tile("second", tile))))
        chunk.add_row(OF_ANCHOR, chunk.plan.tiles + tile, sum_columns(load_matrix(chunk.tile("x", tile)) * by_anchor))
        z_bar = chunk.kept("z_bar", tile) + by_anchor * chunk.row(ANCHOR) * chunk.exact(SLOPE, tile)
        chunk.keep("z_bar", z_bar, tile)
        put((chunk.tile("second", tile), z_bar))
    (by_anchor,) = products([(chunk.tile("second", tile), transposed(chunk.tile("first", tile))) for tile in tiles])
    sent()
    chunk.add_row(QUANTITIES, 0, sum_columns(load_matrix(chunk.tile("k")) * by_anchor))
    put((chunk.tile("left"), chunk.kept("k_bar") + by_anchor * chunk.row(ANCHOR)))
    chunk.place.send_tokens("k_bar", chunk.tile("left"), chunk.number)
    for tile in tiles:
        put((chunk.tile("second", tile), chunk.kept("z_bar", tile) * chunk.row(ANCHOR)))
    sent()


def _update_second(chunk: CarryChunk):
    """Updates dW_2 and dS_2 to the chunk's start; g reuses the buffer of W_1."""
    place, arrived = chunk.place, chunk.place.scratch["read_arrived"]
    plgpu.commit_smem()  # all threads' products have read W_1
    for tile in range(chunk.plan.tiles):
        source = place.inputs["rounded"].at[place.batch, place.head, chunk.number, READ * chunk.plan.tiles + tile]
        plgpu.copy_gmem_to_smem(source, place.scratch["tiles"].at[chunk.slot("first", tile)], arrived)
    plgpu.barrier_wait(arrived)
    for update, row in ((_update_momentum, READ_MOMENTUM), (_update_weights, READ_WEIGHTS)):
        put((chunk.tile("left"), chunk.tokens("out_bar") * chunk.row(row)))
        for tile in range(chunk.plan.tiles):
            update(chunk, chunk.plan.tiles + tile, ("first", tile), ("left", 0))
    for tile in range(chunk.plan.tiles):
        _add_to_weights(chunk, chunk.plan.tiles + tile, ("x", tile), ("error", 0))
    put((chunk.tile("error"), chunk.exact(ERROR) * chunk.row(ANCHOR)))
    for tile in range(chunk.plan.tiles):
        _add_to_weights(chunk, chunk.plan.tiles + tile, ("r_bar", tile), ("error", 0))


def _update_first(chunk: CarryChunk):
    """Updates dW_1 and dS_1 to the chunk's start; q reuses the buffer of e."""
    place, arrived = chunk.place, chunk.place.scratch["q_arrived"]
    plgpu.commit_smem()  # all threads' products have read e
    source = place.tokens(place.inputs["q"], chunk.number)
    plgpu.copy_gmem_to_smem(source, place.scratch["tiles"].at[chunk.slot("error")], arrived)
    plgpu.barrier_wait(arrived)
    for tile in range(chunk.plan.tiles):
        for update, row in ((_update_momentum, READ_MOMENTUM), (_update_weights, READ_WEIGHTS)):
            put((chunk.tile("left"), chunk.exact(READ_BAR, tile) * chunk.row(row)))
            update(chunk, tile, ("error", 0), ("left", 0))
        _add_to_weights(chunk, tile, ("k", 0), ("second", tile))


def _product(chunk: CarryChunk, rows, columns):
    (found,) = products((transposed(chunk.tile(*rows)), chunk.tile(*columns)))
    return found


def _update_momentum(chunk: CarryChunk, number: int, rows, columns):
    weights, momentum = (chunk.place.scratch[name][number] for name in ("weights", "momentum"))
    more = _product(chunk, rows, columns) + load_matrix(weights) * chunk.table[LAST, 1]
    momentum[...] = more + load_matrix(momentum) * chunk.table[LAST, 2]


def _update_weights(chunk: CarryChunk, number: int, rows, columns):
    weights = chunk.place.scratch["weights"][number]
    weights[...] = load_matrix(weights) * chunk.table[LAST, 0] + _product(chunk, rows, columns)


def _add_to_weights(chunk: CarryChunk, number: int, rows, columns):
    weights = chunk.place.scratch["weights"][number]
    weights[...] = load_matrix(weights) + _product(chunk, rows, columns)
