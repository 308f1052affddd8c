"""Launches the Mosaic GPU kernels (sm_90), and walks a program's state along the chunks."""

from typing import NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.mosaic_gpu.parts import COLUMNS, MATRIX, keep, kept


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


class StateWalk(NamedTuple):
    """The static settings of a walk: a state `[inner, outer]` along the chunks of every row and head."""

    scale: float
    batch: int
    heads: int
    chunks: int
    inner: int  # K
    outer: int  # V
    reverse: bool = False

    def at(self, step):
        """The chunk visited at a step."""
        return self.chunks - 1 - step if self.reverse else step

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.outer // COLUMNS


def walk_chunks(walk: StateWalk, stages: int, arrivals: dict, start, final, scratch, step):
    """Runs `step(chunk, blocks by name, state) -> state` over all chunks for one block of columns of one head.

    arrivals: by name, the input blocks of every chunk, as `token_block` returns them. stages: number of chunks in SMEM
    at once. start, final `[B, H, inner, outer]`.
    """
    batch, head, column = (lax.axis_index(name) for name in ("batch", "head", "part"))
    columns = pl.ds(column * COLUMNS, COLUMNS)
    state = ()
    for row in range(0, walk.inner, 64):
        block = plgpu.load(start.at[batch, head, pl.ds(row, 64), columns], layout=MATRIX, optimized=False)
        state = keep(scratch, state, row, block)
    plgpu.commit_smem()

    def body(indices, *blocks_and_state):
        *blocks, state = blocks_and_state
        state = step(walk.at(indices[0]), dict(zip(arrivals, blocks)), state)
        plgpu.commit_smem()  # the matrix unit now sees the state; all threads have read the inputs, new ones may come
        return state

    refs, specs = zip(*arrivals.values())
    pipeline = plgpu.emit_pipeline(
        body, grid=(walk.chunks,), in_specs=specs, max_concurrent_steps=stages, init_carry=state
    )
    state = pipeline(*refs)
    for row in range(0, walk.inner, 64):
        final[batch, head, pl.ds(row, 64), columns] = kept(scratch, state, row)
    plgpu.wait_smem_to_gmem(0)
