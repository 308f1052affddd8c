"""Several updates as one GPU kernel (compute capability 9.0): a head's patterns stay in shared memory (SMEM).

A program runs all updates for `CHUNK` states of one head. The patterns are loaded once. An update visits them block by
block with a running maximum and sum of its softmax, so scores leave the registers only as weights for the matrix unit.
Values are streamed once, at the end. The backward pass is the XLA form's.

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
from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm, RetrievalShapes
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
    if shapes.key not in SIZES or shapes.value not in SIZES:
        return f"the GPU kernel takes D and V of {SIZES[0]} or {SIZES[1]}, not {shapes.key} and {shapes.value}"
    if PARTS[jnp.dtype(shapes.dtype)] > 1 and shapes.key > SIZES[0]:  # the compiler runs out of registers
        return f"the GPU kernel takes {jnp.dtype(shapes.dtype)} states of {SIZES[0]} features, not {shapes.key}"
    if max(shapes.batch, shapes.heads) > MOST_PROGRAMS:
        return f"the GPU kernel takes at most {MOST_PROGRAMS} rows and heads"
    need = _smem_bytes(shapes)
    if need > SMEM_BYTES:
        return f"the GPU kernel would need {need >> 10} KiB of SMEM for these patterns, more than {SMEM_BYTES >> 10}"
    return None


def _smem_bytes(shapes: RetrievalShapes) -> int:
    blocks, parts = -(-shapes.patterns // CHUNK), PARTS[jnp.dtype(shapes.dtype)]
    columns = shapes.key * (blocks + 1) + CHUNK + STAGES * shapes.value  # of patterns and states, weights, values
    return 2 * CHUNK * parts * columns + 4 * CHUNK * blocks


def _run(form: RetrievalForm, state, stored, values, beta, hidden):
    run = shard_over_batch_and_heads(
        partial(_forward, form.steps, form.interpret), ("BHND", "BHMD", "BHMV", "Hx", "BM"), "BHNV"
    )
    return run(state, stored, values, jnp.broadcast_to(beta[:, None], (len(beta), CHUNK)), hidden)


passes = passes_of(_run)


def _forward(steps, interpret, state, stored, values, beta, hidden):
    batch, heads, count, width = state.shape
    parts, value = PARTS[stored.dtype], values.shape[3]
    state = jnp.pad(state, [(0, 0), (0, 0), (0, -count % CHUNK), (0, 0)]).astype(jnp.float32)
    missing = -hidden.shape[1] % CHUNK
    hidden = jnp.pad(hidden, [(0, 0), (0, missing)], constant_values=HIDDEN).reshape(batch, -1, CHUNK)
    blocks = hidden.shape[1]
    stored, values = (
        _bfloat16_parts(jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]).reshape(batch, heads, blocks, CHUNK, -1))
        for x in (stored, values)
    )
    scratch = {
        "stored": [plgpu.SMEM((blocks, CHUNK, width), jnp.bfloat16, transforms=tiles(jnp.bfloat16))] * parts,
        "hidden": plgpu.SMEM((blocks, CHUNK), jnp.float32),
        "state": [matrix(CHUNK, width)] * parts,
        "weights": [matrix(CHUNK, CHUNK)] * parts,
        "arrived": plgpu.Barrier(num_arrivals=parts * blocks + 1),
    }
    kernel = plgpu.kernel(
        partial(_program, steps),
        out_type=(jax.ShapeDtypeStruct((*state.shape[:3], value), jnp.float32),),
        scratch_types=[scratch],
        grid=(batch, heads, state.shape[2] // CHUNK),
        grid_names=("batch", "head", "part"),
        kernel_name="hopfield_retrieval_forward",
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    (out,) = kernel({"state": state, "stored": stored, "values": values, "beta": beta, "hidden": hidden})
    return out[:, :, :count]


def _bfloat16_parts(x) -> list:
    """Returns bfloat16 arrays that sum to x. The compiler may remove a cast and its inverse, but not this."""
    parts = []
    for _ in range(PARTS[x.dtype]):
        parts.append(lax.reduce_precision(x, 8, 7))
        x = x - parts[-1]
    return [part.astype(jnp.bfloat16) for part in parts]


def _program(steps: int, inputs, out, scratch):
    batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "part"))
    rows, blocks = pl.ds(part * CHUNK, CHUNK), scratch["hidden"].shape[0]

    @pl.loop(0, blocks)
    def _arrive(i):
        for source, target in zip(inputs["stored"], scratch["stored"]):
            plgpu.copy_gmem_to_smem(source.at[batch, head, i], target.at[i], scratch["arrived"])

    plgpu.copy_gmem_to_smem(inputs["hidden"].at[batch], scratch["hidden"], scratch["arrived"])
    beta = plgpu.load(inputs["beta"].at[head], layout=BY_ROW, optimized=False)
    state = plgpu.load(inputs["state"].at[batch, head, rows], layout=MATRIX, optimized=False)
    plgpu.barrier_wait(scratch["arrived"])

    def update(_, state):
        see = _shown(scratch, beta, state)
        start = _start(state.shape[1])
        return _mean(
            lax.fori_loop(0, blocks, lambda i, seen: see(i, [x.at[i] for x in scratch["stored"]], seen), start)
        )

    see = _shown(scratch, beta, lax.fori_loop(0, steps - 1, update, state))
    value = inputs["values"][0].shape[-1]
    block = plgpu.BlockSpec((None, CHUNK, value), lambda i: (i, 0, 0), transforms=tiles(jnp.bfloat16))
    pipeline = plgpu.emit_pipeline(
        lambda indices, *refs_and_seen: see(indices[0], refs_and_seen[:-1], refs_and_seen[-1]),
        grid=(blocks,),
        in_specs=[block] * len(inputs["values"]),
        max_concurrent_steps=min(STAGES, blocks),
        init_carry=_start(value),
    )
    out[batch, head, rows] = _mean(pipeline(*(x.at[batch, head] for x in inputs["values"])))


def _start(columns: int):
    """The initial values: maximum of the scores, sum of their exponentials, and weighted sum."""
    rows = partial(jnp.full, (CHUNK,), dtype=jnp.float32)
    top, total = (plgpu.layout_cast(rows(x), BY_ROW) for x in (-jnp.inf, 0.0))
    return top, total, plgpu.layout_cast(jnp.zeros((CHUNK, columns), jnp.float32), MATRIX)


def _shown(scratch, beta, state):
    """Stores the states for the matrix unit. Returns the function that processes a block of patterns.

    It takes the block's number, the parts of the vectors averaged there, and the running values from `_start`.
    """
    split(scratch["state"], state)
    plgpu.commit_smem()

    def see(i, read, seen):
        top, total, sums = seen
        (scores,) = products(pairs(scratch["state"], [transposed(x.at[i]) for x in scratch["stored"]]))
        scores = scores * _by_row(beta, CHUNK) + along_columns(scratch["hidden"].at[i])
        new_top = jnp.maximum(top, plgpu.layout_cast(jnp.max(scores, axis=1), BY_ROW))
        weights, fades = jnp.exp(scores - _by_row(new_top, CHUNK)), jnp.exp(top - new_top)
        split(scratch["weights"], weights)
        plgpu.commit_smem()
        (added,) = products(pairs(scratch["weights"], read))
        plgpu.commit_smem()  # all threads' products have read the weights, so new ones may come
        return new_top, total * fades + sum_columns(weights), sums * _by_row(fades, sums.shape[1]) + added

    return see


def _mean(seen):
    _, total, sums = seen
    return sums / _by_row(total, sums.shape[1])


def _by_row(x, columns: int):
    return lax.broadcast_in_dim(x, (CHUNK, columns), [0])
