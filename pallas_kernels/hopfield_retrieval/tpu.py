"""Several updates as one TPU kernel: a head's patterns and values stay in VMEM through all updates of the states.

The grid is (B, H, blocks of states). The patterns' blocks do not depend on the last axis, so they are loaded once per
row and head. Scores never leave the chip. Which patterns a state sees is computed there from places and segment ids;
the scores of the others are computed too. The backward pass is the XLA form's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from engrax.pallas_kernels.common.matmul import accumulator, precision
from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.hopfield_retrieval.kernels import HIDDEN, passes_of, unserved
from engrax.pallas_kernels.hopfield_retrieval.types import Reach, RetrievalForm, RetrievalShapes
from engrax.pallas_kernels.hopfield_retrieval.visibility import BLIND, UNSEEN
from engrax.pallas_kernels.mosaic_tpu.parts import LANES, VMEM_BYTES, call, tiled_bytes

ROWS, MOST_ROWS = 16, 256  # a block of states: a multiple of a bfloat16 tile's rows, and the most rows


def unsupported(shapes: RetrievalShapes) -> str | None:
    """Returns why this kernel cannot serve a call, or None if it can."""
    reason = unserved("TPU", shapes)
    if reason is not None:
        return reason
    size, rows = jnp.dtype(shapes.dtype).itemsize, _rows(shapes.states)
    patterns = shapes.patterns + -shapes.patterns % LANES
    need = 2 * (tiled_bytes(patterns, shapes.key, size) + tiled_bytes(patterns, shapes.value, size))
    need += 4 * tiled_bytes(rows, patterns) + 8 * tiled_bytes(rows, max(shapes.key, shapes.value))
    if need > VMEM_BYTES:
        return f"the TPU kernel would need {need >> 20} MiB of VMEM for these patterns, more than {VMEM_BYTES >> 20}"
    return None


def _rows(states: int) -> int:
    return min(MOST_ROWS, states + -states % ROWS)


def _run(form: RetrievalForm, state, stored, values, beta, ids, stored_ids):
    in_dims = ("BHND", "BHMD", "BHMV", "Hxx", "BNx", "BxM")
    run = shard_over_batch_and_heads(partial(_forward, form), in_dims, "BHNV")
    return run(state, stored, values, beta[:, None, None], ids[..., None], stored_ids[:, None])


passes = passes_of(_run)


def _forward(form, state, stored, values, beta, ids, stored_ids):
    batch, heads, count, width = state.shape
    rows, missing, first_place = _rows(count), -stored.shape[2] % LANES, stored.shape[2] - count
    state = jnp.pad(state, [(0, 0), (0, 0), (0, -count % rows), (0, 0)])
    ids = jnp.pad(ids, [(0, 0), (0, -count % rows), (0, 0)], constant_values=BLIND)
    stored, values = (jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]) for x in (stored, values))
    stored_ids = jnp.pad(stored_ids, [(0, 0), (0, 0), (0, missing)], constant_values=UNSEEN)

    def block(size):
        return pl.BlockSpec((None, None, rows, size), lambda b, h, n: (b, h, n, 0))

    def whole(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0))

    out = jax.ShapeDtypeStruct((*state.shape[:3], values.shape[3]), accumulator(state.dtype))
    (out,) = call(
        partial(_kernel, form.steps, form.reach, first_place),
        name="hopfield_retrieval_forward",
        grid=(batch, heads, state.shape[2] // rows),
        parallel=2,
        inputs=(state, stored, values, beta, ids, stored_ids),
        in_specs=(
            block(width),
            whole(stored),
            whole(values),
            pl.BlockSpec((None, 1, 1), lambda b, h, n: (h, 0, 0)),
            pl.BlockSpec((None, rows, 1), lambda b, h, n: (b, n, 0)),
            pl.BlockSpec((None, *stored_ids.shape[1:]), lambda b, h, n: (b, 0, 0)),
        ),
        outputs=(out,),
        out_specs=(block(values.shape[3]),),
        scratch=(),
        interpret=form.interpret,
    )
    return out[:, :, :count]


def _kernel(steps, reach, first_place, state, stored, values, beta, ids, stored_ids, out):
    x, v, scale = stored[...], values[...], beta[...]
    shown = (ids[...] == stored_ids[...]) & _near(reach, first_place, ids.shape[0], x.shape[0])

    def read(xi, of):
        scores = jnp.where(shown, scale * _dot(xi.astype(x.dtype), x, 1), HIDDEN)
        top = jnp.max(scores, axis=1, keepdims=True)
        exponential = jnp.exp(scores - top)
        mean = _dot(exponential.astype(of.dtype), of, 0) / jnp.sum(exponential, axis=1, keepdims=True)
        return jnp.where(top > HIDDEN / 2, mean, 0)

    xi = state[...].astype(accumulator(x.dtype))
    for _ in range(steps - 1):
        xi = read(xi, x)
    out[...] = read(xi, v)


def _near(reach: Reach, first_place, states, patterns):
    """Which patterns are within reach of this block of states."""
    row, column = (lax.broadcasted_iota(jnp.int32, (states, patterns), axis) for axis in (0, 1))
    age = row - column + (pl.program_id(2) * states + first_place)
    near = jnp.full(age.shape, True)
    near = near & (age >= 0) if reach.causal else near
    return near if reach.window is None else near & (age < reach.window)


def _dot(a, b, axis):
    sums = accumulator(b.dtype)
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision(b), preferred_element_type=sums)
