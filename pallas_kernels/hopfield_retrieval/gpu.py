"""Several updates as one GPU kernel (compute capability 9.0): a head's patterns stay in shared memory (SMEM).

A program runs all updates for `CHUNK` states of one head. The patterns are loaded once. An update visits them block by
block with a running maximum and sum of its softmax, so scores leave the registers only as weights for the matrix unit.
Values are streamed once, at the end. Which patterns a state sees is computed there from places and segment ids; blocks
out of the reach of all states of the program are skipped. The backward pass is the XLA form's.

The matrix unit takes bfloat16. A float32 matrix is split into a sum of three bfloat16 matrices. A product of two such
sums uses the six products that matter; the others are below float32's last digit.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.hopfield_retrieval.kernels import HIDDEN, passes_of, unserved
from engrax.pallas_kernels.hopfield_retrieval.types import Reach, RetrievalForm, RetrievalShapes
from engrax.pallas_kernels.hopfield_retrieval.visibility import BLIND, UNSEEN
from engrax.pallas_kernels.mosaic_gpu.parts import (
    BY_ROW,
    CHUNK,
    MATRIX,
    MOST_PROGRAMS,
    SIZES,
    SMEM_BYTES,
    along_columns,
    matrix,
    pairs,
    products,
    split,
    sum_columns,
    tiles,
    transposed,
)

PARTS = {jnp.dtype(jnp.bfloat16): 1, jnp.dtype(jnp.float32): 3}  # bfloat16 matrices per matrix of the dtype
STAGES = 2  # blocks of values in SMEM at once


def unsupported(shapes: RetrievalShapes) -> str | None:
    """Returns why this kernel cannot serve a call, or None if it can."""
    reason = unserved("GPU", shapes)
    if reason is not None:
        return reason
    if max(shapes.key, shapes.value) > SIZES[-1]:
        return f"the GPU kernel takes D and V of at most {SIZES[-1]}, not {shapes.key} and {shapes.value}"
    if PARTS[jnp.dtype(shapes.dtype)] > 1 and shapes.key > SIZES[0]:  # the compiler runs out of registers
        return f"the GPU kernel takes {jnp.dtype(shapes.dtype)} states of at most {SIZES[0]} features, not {shapes.key}"
    if max(shapes.batch, shapes.heads) > MOST_PROGRAMS:
        return f"the GPU kernel takes at most {MOST_PROGRAMS} rows and heads"
    blocks, parts = -(-shapes.patterns // CHUNK), PARTS[jnp.dtype(shapes.dtype)]
    key, value = _width(shapes.key), _width(shapes.value)
    columns = key * (blocks + 1) + CHUNK + STAGES * value  # of patterns and states, weights, values
    need = 2 * CHUNK * parts * columns + 4 * CHUNK * blocks
    if need > SMEM_BYTES:
        what = f"{blocks} blocks of {CHUNK} patterns of {key} features"
        return f"the GPU kernel would need {need >> 10} KiB of SMEM for {what}, more than {SMEM_BYTES >> 10}"
    return None


def _width(features: int) -> int:
    """The width in the kernel: columns of zeros are added up to a size of the matrix unit."""
    return next(size for size in SIZES if features <= size)


def _run(form: RetrievalForm, state, stored, values, beta, ids, stored_ids):
    run = shard_over_batch_and_heads(partial(_forward, form), ("BHND", "BHMD", "BHMV", "Hx", "BN", "BM"), "BHNV")
    return run(state, stored, values, jnp.broadcast_to(beta[:, None], (len(beta), CHUNK)), ids, stored_ids)


passes = passes_of(_run)


def _forward(form, state, stored, values, beta, ids, stored_ids):
    (batch, heads, count, _), value = state.shape, values.shape[3]
    parts, first_place = PARTS[stored.dtype], stored.shape[2] - count
    state, stored, values = (_padded(x, 2, 3) for x in (state, stored, values))
    ids, stored_ids = _padded(ids, 1, fill=BLIND), _padded(stored_ids, 1, fill=UNSEEN).reshape(batch, -1, CHUNK)
    blocks, width = stored_ids.shape[1], state.shape[3]
    stored, values = (_bfloat16_parts(x.reshape(batch, heads, blocks, CHUNK, -1)) for x in (stored, values))
    scratch = {
        "stored": [plgpu.SMEM((blocks, CHUNK, width), jnp.bfloat16, transforms=tiles(jnp.bfloat16))] * parts,
        "ids": plgpu.SMEM((blocks, CHUNK), jnp.int32),
        "state": [matrix(CHUNK, width)] * parts,
        "weights": [matrix(CHUNK, CHUNK)] * parts,
        "arrived": plgpu.Barrier(num_arrivals=parts * blocks + 1),
    }
    kernel = plgpu.kernel(
        partial(_program, form.steps, form.reach, first_place),
        out_type=(jax.ShapeDtypeStruct((*state.shape[:3], values[0].shape[-1]), jnp.float32),),
        scratch_types=[scratch],
        grid=(batch, heads, state.shape[2] // CHUNK),
        grid_names=("batch", "head", "part"),
        kernel_name="hopfield_retrieval_forward",
        interpret=plgpu.InterpretGPUParams() if form.interpret else None,
    )
    inputs = {"state": state.astype(jnp.float32), "stored": stored, "values": values, "beta": beta}
    (out,) = kernel(inputs | {"ids": ids, "stored_ids": stored_ids})
    return out[:, :, :count, :value]


def _padded(x, rows: int, columns: int | None = None, fill=0):
    """Pads axis `rows` to whole blocks, and axis `columns` to a width of the kernel."""
    widths = [(0, 0)] * x.ndim
    widths[rows] = (0, -x.shape[rows] % CHUNK)
    if columns is not None:
        widths[columns] = (0, _width(x.shape[columns]) - x.shape[columns])
    return jnp.pad(x, widths, constant_values=fill)


def _bfloat16_parts(x) -> list:
    """Returns bfloat16 arrays that sum to x. The compiler may remove a cast and its inverse, but not this."""
    parts = []
    for _ in range(PARTS[x.dtype]):
        parts.append(lax.reduce_precision(x, 8, 7))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def _program(steps: int, reach: Reach, first_place: int, inputs, out, scratch):
    batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    rows, place = pl.ds(part * CHUNK, CHUNK), part * CHUNK + first_place
    first, end = _blocks_in_reach(reach, place, scratch["ids"].shape[0])

    @pl.loop(0, scratch["ids"].shape[0])
    def _arrive(i):
        for source, target in zip(inputs["stored"], scratch["stored"]):
            plgpu.copy_gmem_to_smem(source.at[batch, head, i], target.at[i], scratch["arrived"])

    plgpu.copy_gmem_to_smem(inputs["stored_ids"].at[batch], scratch["ids"], scratch["arrived"])
    beta = plgpu.load(inputs["beta"].at[head], layout=BY_ROW, optimized=False)
    ids = plgpu.load(inputs["ids"].at[batch, rows], layout=BY_ROW, optimized=False)
    state = plgpu.load(inputs["state"].at[batch, head, rows], layout=MATRIX, optimized=False)
    plgpu.barrier_wait(scratch["arrived"])
    shown = partial(_shown, reach, place, ids, scratch["ids"])

    def update(_, state):
        see = _looking(scratch, shown, beta, state)
        start = _start(state.shape[1])
        return _mean(
            lax.fori_loop(first, end, lambda i, seen: see(i, [x.at[i] for x in scratch["stored"]], seen), start)
        )

    see = _looking(scratch, shown, beta, lax.fori_loop(0, steps - 1, update, state))
    value = inputs["values"][0].shape[-1]
    block = plgpu.BlockSpec((None, CHUNK, value), lambda i: (first + i, 0, 0), transforms=tiles(jnp.bfloat16))
    pipeline = plgpu.emit_pipeline(
        lambda indices, *refs_and_seen: see(first + indices[0], refs_and_seen[:-1], refs_and_seen[-1]),
        grid=(end - first,),
        in_specs=[block] * len(inputs["values"]),
        max_concurrent_steps=min(STAGES, scratch["ids"].shape[0]),
        init_carry=_start(value),
    )
    out[batch, head, rows] = _mean(pipeline(*(x.at[batch, head] for x in inputs["values"])))


def _blocks_in_reach(reach: Reach, place, blocks: int):
    """Returns the first block of patterns in reach of the 64 states from `place` on, and the block after the last.

    There is always one block, though no state may see a pattern there.
    """

    def block_of(place):
        return lax.div(jnp.maximum(place, 0), jnp.int32(CHUNK))

    end = jnp.minimum(block_of(place + CHUNK - 1) + 1, blocks) if reach.causal else blocks
    return 0 if reach.window is None else block_of(place - reach.window + 1), end


def _shown(reach: Reach, place, ids, stored_ids, i):
    """Returns the mask of the patterns of block i (columns) that the states (rows) see."""
    shown = _by_row(ids, CHUNK) == along_columns(stored_ids.at[i])
    if reach == Reach():
        return shown
    column = plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), 1, layout=MATRIX)
    own = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=BY_ROW) + (place - i * CHUNK)  # the place in the block
    shown = shown & (column <= _by_row(own, CHUNK)) if reach.causal else shown
    return shown if reach.window is None else shown & (column > _by_row(own - reach.window, CHUNK))


def _start(columns: int):
    """The initial values: maximum of the scores, sum of their exponentials, and weighted sum."""
    rows = partial(jnp.full, (CHUNK,), dtype=jnp.float32)
    top, total = (plgpu.layout_cast(rows(x), BY_ROW) for x in (-jnp.inf, 0.0))
    return top, total, plgpu.layout_cast(jnp.zeros((CHUNK, columns), jnp.float32), MATRIX)


def _looking(scratch, shown, beta, state):
    """Stores the states for the matrix unit. Returns the function that processes a block of patterns.

    It takes the block's number, the parts of the vectors averaged there, and the running values from `_start`.
    shown(i): the mask of block i.
    """
    split(scratch["state"], state)
    plgpu.commit_smem()

    def see(i, read, seen):
        top, total, sums = seen
        (scores,) = products(pairs(scratch["state"], [transposed(x.at[i]) for x in scratch["stored"]]))
        scores = jnp.where(shown(i), scores * _by_row(beta, CHUNK), HIDDEN)
        new_top = jnp.maximum(top, plgpu.layout_cast(jnp.max(scores, axis=1), BY_ROW))
        weights, fades = jnp.exp(scores - _by_row(new_top, CHUNK)), jnp.exp(top - new_top)
        split(scratch["weights"], weights)
        plgpu.commit_smem()
        (added,) = products(pairs(scratch["weights"], read))
        plgpu.commit_smem()  # all threads' products have read the weights, so new ones may come
        return new_top, total * fades + sum_columns(weights), sums * _by_row(fades, sums.shape[1]) + added

    return see


def _mean(seen):
    """The mean of the visible patterns; 0 for a state that has seen none, whose weights are those of hidden ones."""
    top, total, sums = seen
    share = jnp.where(top > HIDDEN / 2, 1 / total, 0.0)
    return sums * _by_row(share, sums.shape[1])


def _by_row(x, columns: int):
    return lax.broadcast_in_dim(x, (CHUNK, columns), [0])
