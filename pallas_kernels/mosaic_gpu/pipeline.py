"""Launches the Mosaic GPU kernels (sm_90), and walks a program's state along the chunks."""

from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, COLUMNS, MATRIX, keep, kept, load_matrix

STAGES = 2  # chunks in SMEM at once


def run_kernel(name: str, body, out_types: dict, scratch: dict, grid, interpret: bool, inputs: dict) -> dict:
    """Runs `body(inputs, outputs, scratch)`, all dicts of references, once per grid point."""
    kernel = plgpu.kernel(
        body,
        out_type=(out_types,),
        scratch_types=[scratch],
        grid=grid,
        grid_names=("batch", "head", "part"),
        kernel_name=name,
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return kernel(inputs)[0]


class Place(NamedTuple):
    """What one program of a walk computes: one block of columns of one state, along some chunks of a row."""

    state: Any  # the number of the state, among all rows' and segments'
    row: Any
    head: Any
    column: Any  # the number of the block
    first: Any  # chunk
    chunks: Any  # how many
    heads: int  # of the walk
    reverse: bool

    def at(self, step):
        """The chunk visited at a step."""
        return self.first + (self.chunks - 1 - step if self.reverse else step)

    @property
    def columns(self):
        """The slice of the state's columns."""
        return pl.ds(self.column * COLUMNS, COLUMNS)


class StateWalk(NamedTuple):
    """The static settings of a walk: states `[inner, outer]` along the chunks of every row and head.

    segments: the number of states per row; None: one, along all chunks.
    """

    rows: int
    heads: int
    chunks: int  # of a row
    inner: int  # K
    outer: int  # V
    segments: int | None = None
    scale: float = 1.0
    reverse: bool = False

    @classmethod
    def of(cls, length: int, start, bounds, **options) -> "StateWalk":
        """The walk along `length` tokens from the states `start [S, H, inner, outer]`.

        bounds: int32 `[B, N + 1]`, the chunks of a row's N segments (`widths.to_blocks`), and S = B N; None: S = B.
        """
        states, heads, inner, outer = start.shape
        segments = None if bounds is None else bounds.shape[1] - 1
        return cls(states // (segments or 1), heads, length // CHUNK, inner, outer, segments, **options)

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.rows * (self.segments or 1), self.heads, self.outer // COLUMNS

    @property
    def per_chunk(self) -> tuple[int, ...]:
        """The shape of the states of all chunks."""
        return self.rows, self.heads, self.chunks, self.inner, self.outer

    def place(self, bounds) -> Place:
        """Returns what this program computes; bounds: their reference, or None."""
        state, head, column = (lax.axis_index(name) for name in ("batch", "head", "part"))
        if self.segments is None:
            return Place(state, state, head, column, 0, self.chunks, self.heads, self.reverse)
        row, segment = lax.div(state, self.segments), lax.rem(state, self.segments)
        first, end = bounds[row, segment], bounds[row, segment + 1]
        return Place(state, row, head, column, first, end - first, self.heads, self.reverse)


def matched(place: Place, chunk, block, origin, row: int):
    """Returns 64 rows of the state that a walk in the other direction had at this chunk.

    block: the state that it stored, in bfloat16. origin `[S, H, inner, outer]`: the states that it began with, read at
    this walk's last chunk: in a segment shorter than a chunk, rounding them would be the gates' largest error.
    """

    def exact():
        here = origin.at[place.state, place.head, pl.ds(row, 64), place.columns]
        return plgpu.load(here, layout=MATRIX, optimized=False)

    return lax.cond(chunk == place.at(place.chunks - 1), exact, lambda: load_matrix(block.at[pl.ds(row, 64), :]))


def walk_chunks(place: Place, arrivals: dict, start, final, scratch, step):
    """Runs `step(chunk, blocks by name, state) -> state` over a program's chunks; there may be none.

    arrivals: by name, the input blocks of every chunk, as `token_block` returns them. start, final
    `[S, H, inner, outer]`.
    """
    mine, state = (place.state, place.head), ()
    rows = range(0, start.shape[2], 64)
    for row in rows:
        block = plgpu.load(start.at[*mine, pl.ds(row, 64), place.columns], layout=MATRIX, optimized=False)
        state = keep(scratch, state, row, block)
    plgpu.commit_smem()

    def body(indices, *blocks_and_state):
        *blocks, state = blocks_and_state
        state = step(place.at(indices[0]), dict(zip(arrivals, blocks)), state)
        plgpu.commit_smem()  # the matrix unit now sees the state; all threads have read the inputs, new ones may come
        return state

    refs, specs = zip(*arrivals.values())
    pipeline = plgpu.emit_pipeline(
        body, grid=(place.chunks,), in_specs=specs, max_concurrent_steps=STAGES, init_carry=state
    )
    state = pipeline(*refs)
    for row in rows:
        final[*mine, pl.ds(row, 64), place.columns] = kept(scratch, state, row)
    plgpu.wait_smem_to_gmem(0)
