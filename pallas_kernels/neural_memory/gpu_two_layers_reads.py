"""The Mosaic GPU kernel (sm_90) that differentiates the queries' reads of a two-layer memory, all chunks at once.

Given the matrices at its start, each chunk is independent. x, e, delta, g and y (before the activation: g = f(y)) are
recomputed as in `gpu_two_layers_kernels`:

    D_2 = C (g x^T),  G_2 = -(d out) e^T      dg = A (d out) W_2^T + B (d out) S_2^T + (C o G_2) x,   dy = dg f'(y)
    D_1 = C (q k^T),  G_1 = -dy delta^T       dq = A dy W_1^T + B dy S_1^T + (C o G_1) k
    dC = G_2 o (g x^T) + G_1 o (q k^T)

The reads also add to the cotangents of the keys' side: d delta = -D_1^T dy, de = -D_2^T d out,
dx = (C o G_2)^T g, dk = (C o G_1)^T q. The cotangents of A and B are inner products of g with the terms of dg and of q
with those of dq. `gpu_two_layers_carry` computes the rest. All elementwise work is done here, where chunks run in
parallel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, load_matrix, matrix, products, sum_columns, transposed
from engrax.pallas_kernels.mosaic_gpu.pipeline import run_kernel
from engrax.pallas_kernels.neural_memory.gpu_kernels import (
    ANCHOR,
    READ_MOMENTUM,
    READ_WEIGHTS,
    TABLE_ROWS,
    PackedTokens,
)
from engrax.pallas_kernels.neural_memory.gpu_two_layers_kernels import (
    TILE,
    TwoLayerChunk,
    TwoLayerProgram,
    TwoLayerSizes,
    load_global,
    put,
    sizes_of,
    tiles_scratch,
)
from engrax.pallas_kernels.neural_memory.types import with_derivatives

# Where each quantity's tiles begin in "exact" and "rounded", counted in tiles of the hidden features after the first
# three of "exact": e, and the parts of de and dk, which have one tile each.
ERROR, ERROR_BAR, K_BAR = range(3)
DELTA, SLOPE, BEND, DELTA_BAR, X_BAR, READ_BAR = range(6)
X, READ = range(2)
_READS = (("weights", READ_WEIGHTS), ("momentum", READ_MOMENTUM))


def exact_tile(plan: TwoLayerSizes, quantity: int, tile: int) -> int:
    """Returns the position of a tile of DELTA, ..., READ_BAR in "exact"."""
    return 3 + quantity * plan.tiles + tile


def read_gradients(tokens: PackedTokens, again: dict, out_bar, activation: str, *, interpret: bool = False) -> dict:
    """Returns the reads' gradients and the inputs of `gpu_two_layers_carry`. again: the result of `states`.

    "q_bar" `[B, T, H, K]` bfloat16; the cotangents of C, A and B, "write_bar" `[N, B, H, C, C]` and "rows_bar"
    `[N, B, H, 2, C]`. Per chunk, as tiles `[B, H, N, ..., 64, 64]`: "rounded" in bfloat16 has x and g; "exact" in
    float32 has e, the parts of de and dk, delta, f'(z), r f''(z) with delta = r f'(z), the parts of d delta and dx, and
    dy.
    """
    plan = sizes_of(tokens, again["weights_at"].shape[3] // 4, activation)
    lead = (plan.chunks, plan.batch, plan.heads)
    out_types = {
        "q_bar": plan.tokens(),
        "write_bar": jax.ShapeDtypeStruct((*lead, CHUNK, CHUNK), jnp.float32),
        "rows_bar": jax.ShapeDtypeStruct((*lead, 2, CHUNK), jnp.float32),
        "rounded": plan.by_chunk(2 * plan.tiles, jnp.bfloat16),
        "exact": plan.by_chunk(3 + 6 * plan.tiles),
    }
    inputs = tokens._asdict() | {"out_bar": out_bar, "weights": again["weights_at"], "momentum": again["momentum_at"]}
    scratch = {
        "tiles": tiles_scratch(_counts(plan)),
        "before": [matrix(TILE, TILE, jnp.float32)] * plan.tiles,
        "write_bar": matrix(TILE, TILE, jnp.float32),
        "table": plgpu.SMEM((TABLE_ROWS, CHUNK), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=5 + 4 * plan.tiles),
    }
    grid = (plan.batch, plan.heads, plan.chunks)
    body = partial(_differentiate, plan)
    return run_kernel("neural_memory_backward_reads", body, out_types, scratch, grid, interpret, inputs)


def _counts(plan: TwoLayerSizes) -> dict:
    single = dict.fromkeys(("q", "k", "v", "out_bar", "scores", "square"), 1)
    matrices = dict.fromkeys(("weights", "momentum"), 2 * plan.tiles)
    return single | matrices | dict.fromkeys(("x", "delta", "read"), plan.tiles)


class ReadsChunk(TwoLayerChunk):
    """A chunk that loads its tokens and the tiles of weights and momentum at its start."""

    def store(self, quantity: int, value, tile: int | None = None):
        """Stores a tile of "exact"."""
        found = quantity if tile is None else exact_tile(self.plan, quantity, tile)
        self.place.store("exact", value, self.number, found)

    def stored(self, quantity: int, tile: int):
        exact = self.place.outputs["exact"].at[self.place.batch, self.place.head, self.number]
        return load_global(exact.at[exact_tile(self.plan, quantity, tile)])

    def send(self, quantity: int, name: str, tile: int):
        """Stores a tile in "rounded"."""
        self.place.send("rounded", self.tile(name, tile), self.number, quantity * self.plan.tiles + tile)

    def scaled(self, value):
        """Returns C o value."""
        return value * self.place.write(self.number)


def _differentiate(plan: TwoLayerSizes, inputs, outputs, scratch):
    place = TwoLayerProgram(lax.axis_index("batch"), lax.axis_index("head"), inputs, outputs, scratch)
    chunk = ReadsChunk(plan, place, _counts(plan), lax.axis_index("part"), scratch["table"], {})
    _fetch(chunk)
    _keys(chunk)
    _queries(chunk)
    rows = _first_layer(chunk, _second_layer(chunk))
    for number, row in enumerate(rows):
        outputs["rows_bar"].at[chunk.number, place.batch, place.head][number] = row
    plgpu.wait_smem_to_gmem(0)


def _fetch(chunk: ReadsChunk):
    place, arrived, tiles = chunk.place, chunk.place.scratch["arrived"], chunk.place.scratch["tiles"]
    for name in ("q", "k", "v", "out_bar"):
        source = place.tokens(place.inputs[name], chunk.number)
        plgpu.copy_gmem_to_smem(source, tiles.at[chunk.slot(name)], arrived)
    for name in ("weights", "momentum"):
        for number in range(2 * chunk.plan.tiles):
            source = place.inputs[name].at[place.batch, place.head, chunk.number, number]
            plgpu.copy_gmem_to_smem(source, tiles.at[chunk.slot(name, number)], arrived)
    plgpu.copy_gmem_to_smem(place.inputs["table"].at[chunk.number, place.batch, place.head], chunk.table, arrived)
    plgpu.barrier_wait(arrived)


def _keys(chunk: ReadsChunk):
    """Computes x, delta and, in the buffer of v, e; stores these, f'(z) and r f''(z)."""
    f, df, d2f = with_derivatives(chunk.plan.activation)
    hidden, second, read = range(chunk.plan.tiles), chunk.plan.tiles, 0.0

    def z(tile):
        (z,) = products((chunk.tile("k"), chunk.tile("weights", tile)))
        return z * chunk.row(ANCHOR)

    for tile in hidden:
        put((chunk.tile("x", tile), f(z(tile))))
        chunk.send(X, "x", tile)
        chunk.store(SLOPE, df(z(tile)), tile)
        (part,) = products((chunk.tile("x", tile), chunk.tile("weights", second + tile)))
        read = read + part
    error = read * chunk.row(ANCHOR) - load_matrix(chunk.tile("v"))
    chunk.store(ERROR, error)
    put((chunk.tile("v"), error))
    for tile in hidden:
        bend = d2f(z(tile))
        (r,) = products((chunk.tile("v"), transposed(chunk.tile("weights", second + tile))))
        r = r * chunk.row(ANCHOR)
        chunk.store(BEND, r * bend, tile)
        delta = r * chunk.stored(SLOPE, tile)
        chunk.store(DELTA, delta, tile)
        put((chunk.tile("delta", tile), delta))


def _queries(chunk: ReadsChunk):
    """Computes y, g and D_1; stores g."""
    f, _, _ = with_derivatives(chunk.plan.activation)
    (scores,) = products((chunk.tile("q"), transposed(chunk.tile("k"))))
    put((chunk.tile("scores"), chunk.scaled(scores)))
    for tile in range(chunk.plan.tiles):
        by_weights, by_momentum, local = products(
            (chunk.tile("q"), chunk.tile("weights", tile)),
            (chunk.tile("q"), chunk.tile("momentum", tile)),
            (chunk.tile("scores"), chunk.tile("delta", tile)),
        )
        y = by_weights * chunk.row(READ_WEIGHTS) + by_momentum * chunk.row(READ_MOMENTUM) - local
        chunk.place.scratch["before"][tile][...] = y
        put((chunk.tile("read", tile), f(y)))
        chunk.send(READ, "read", tile)


def _second_layer(chunk: ReadsChunk):
    """Computes dy in the buffer of S_2, and G_2 o (g x^T); stores dy and the parts of de and dx.

    Returns the parts of dA and dB.
    """
    f, df, _ = with_derivatives(chunk.plan.activation)
    hidden, scratch, rows = range(chunk.plan.tiles), chunk.place.scratch, [0.0, 0.0]
    (scores,) = products([(chunk.tile("read", tile), transposed(chunk.tile("x", tile))) for tile in hidden])
    (matches,) = products((chunk.tile("out_bar"), transposed(chunk.tile("v"))))
    scratch["write_bar"][...] = scores * matches
    put((chunk.tile("square"), chunk.scaled(scores)))
    (error_bar,) = products((transposed(chunk.tile("square")), chunk.tile("out_bar")))
    chunk.store(ERROR_BAR, -error_bar)
    put((chunk.tile("square"), chunk.scaled(matches)))
    for tile in hidden:
        g, total = f(load_matrix(scratch["before"][tile])), 0.0
        plgpu.commit_smem()  # keeps later work from being moved up, which would need too many registers
        for number, (name, row) in enumerate(_READS):
            (part,) = products((chunk.tile("out_bar"), transposed(chunk.tile(name, chunk.plan.tiles + tile))))
            rows[number] = rows[number] + sum_columns(g * part)
            total = total + part * chunk.row(row)
        (local,) = products((chunk.tile("square"), chunk.tile("x", tile)))
        total = total - local
        plgpu.commit_smem()
        y_bar = total * df(load_matrix(scratch["before"][tile]))
        chunk.store(READ_BAR, y_bar, tile)
        put((chunk.tile("momentum", chunk.plan.tiles + tile), y_bar))
        (x_bar,) = products((transposed(chunk.tile("square")), chunk.tile("read", tile)))
        chunk.store(X_BAR, -x_bar, tile)
    return rows


def _first_layer(chunk: ReadsChunk, rows):
    """Stores dq, dC and the parts of d delta and dk. Returns dA and dB; `rows` are their parts so far."""
    place, hidden, found = chunk.place, range(chunk.plan.tiles), []

    def with_read_bar(name: str):  # dy times the transpose of the named tiles, over all tiles
        of_read = partial(chunk.tile, "momentum")
        return [(of_read(chunk.plan.tiles + tile), transposed(chunk.tile(name, tile))) for tile in hidden]

    for tile in hidden:
        read_bar = chunk.tile("momentum", chunk.plan.tiles + tile)
        (delta_bar,) = products((transposed(chunk.tile("scores")), read_bar))
        chunk.store(DELTA_BAR, -delta_bar, tile)
    (matches,) = products(with_read_bar("delta"))
    put((chunk.tile("square"), chunk.scaled(matches)))
    (scores,) = products((chunk.tile("q"), transposed(chunk.tile("k"))))
    write_bar = -(matches * scores + load_matrix(place.scratch["write_bar"]))
    place.outputs["write_bar"].at[chunk.number, place.batch, place.head][...] = write_bar
    plgpu.commit_smem()
    (k_bar,) = products((transposed(chunk.tile("square")), chunk.tile("q")))
    chunk.store(K_BAR, -k_bar)
    (local,) = products((chunk.tile("square"), chunk.tile("k")))
    total = -local
    for (name, row), so_far in zip(_READS, rows):
        (part,) = products(with_read_bar(name))
        found.append(so_far + sum_columns(load_matrix(chunk.tile("q")) * part))
        total = total + part * chunk.row(row)
    put((chunk.tile("q"), total))
    place.send_tokens("q_bar", chunk.tile("q"), chunk.number)
    return found
