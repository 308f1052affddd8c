"""Several updates as one TPU kernel: patterns and values of a head stay in VMEM, where states go through all updates.

The grid is (B, H, blocks of states); the patterns' blocks do not depend on the last axis, so they are fetched once for
a row and head. Scores never leave the chip. The backward pass is the XLA form's.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from engrax.pallas_kernels.dots import accumulator, precision
from engrax.pallas_kernels.hopfield_retrieval.types import Form, Shapes
from engrax.pallas_kernels.hopfield_retrieval.xla import hopfield_retrieval_xla
from engrax.pallas_kernels.mesh import over_mesh
from engrax.pallas_kernels.tpu_common import LANES, VMEM_BYTES, call, tiled_bytes

ROWS, MOST_ROWS = 16, 256  # a block of states: a multiple of a tile's rows in bfloat16, and what it holds at most
MOST_STEPS = 8  # they are written out: loops of few patterns end in an error of the compiler for v6e
HIDDEN = -1e30  # added to the score of what is hidden


def unsupported(shapes: Shapes) -> str | None:
    """Returns why this kernel cannot serve a call, None if it can."""
    if shapes.steps is None or not 2 <= shapes.steps <= MOST_STEPS:
        return f"the TPU kernel makes a fixed number of updates, 2 to {MOST_STEPS} (one is attention)"
    if (shapes.separation, shapes.similarity) != ("softmax", "dot"):
        return f"the TPU kernel has softmax of dot products, not {shapes.separation} of {shapes.similarity}"
    if shapes.mask_per_state:
        return "the TPU kernel takes masks [B, M], not [B, N, M]"
    if shapes.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 or bfloat16, not {jnp.dtype(shapes.dtype)}"
    size, rows = jnp.dtype(shapes.dtype).itemsize, _rows(shapes.states)
    patterns = shapes.patterns + -shapes.patterns % LANES
    need = 2 * (tiled_bytes(patterns, shapes.key, size) + tiled_bytes(patterns, shapes.value, size))
    need += 4 * tiled_bytes(rows, patterns) + 8 * tiled_bytes(rows, max(shapes.key, shapes.value))
    if need > VMEM_BYTES:
        return f"the TPU kernel would need {need >> 20} MiB of VMEM for these patterns, more than {VMEM_BYTES >> 20}"
    return None


def _rows(states: int) -> int:
    return min(MOST_ROWS, states + -states % ROWS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def retrieve(form: Form, interpret: bool, state, stored, values, beta, visible):
    """Returns what every state retrieves, as `hopfield_retrieval_xla`.

    Hidden patterns and their values are zeros: where nothing is visible, all weigh the same and their mean is 0.
    """
    shown = jnp.ones((len(state), 1, stored.shape[2]), bool) if visible is None else visible
    hidden = jnp.where(shown, 0, HIDDEN).astype(jnp.float32)
    run = over_mesh(partial(_forward, form, interpret), ("BHND", "BHMD", "BHMV", "Hxx", "BxM"), "BHNV")
    return run(state, stored, values, beta[:, None, None], hidden)


def _retrieve_fwd(form, interpret, *arrays):
    return retrieve(form, interpret, *arrays), arrays


def _retrieve_bwd(form, interpret, arrays, bar):
    *floats, visible = arrays
    return *jax.vjp(lambda *floats: hopfield_retrieval_xla(form, *floats, visible), *floats)[1](bar), None


retrieve.defvjp(_retrieve_fwd, _retrieve_bwd)


def _forward(form, interpret, state, stored, values, beta, hidden):
    batch, heads, count, width = state.shape
    rows, missing = _rows(count), -stored.shape[2] % LANES
    state = jnp.pad(state, [(0, 0), (0, 0), (0, -count % rows), (0, 0)])
    stored, values = (jnp.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]) for x in (stored, values))
    hidden = jnp.pad(hidden, [(0, 0), (0, 0), (0, missing)], constant_values=HIDDEN)

    def block(size):
        return pl.BlockSpec((None, None, rows, size), lambda b, h, n: (b, h, n, 0))

    def whole(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, n: (b, h, 0, 0))

    out = jax.ShapeDtypeStruct((*state.shape[:3], values.shape[3]), accumulator(state.dtype))
    (out,) = call(
        partial(_kernel, form.steps),
        name="hopfield_retrieval_forward",
        grid=(batch, heads, state.shape[2] // rows),
        parallel=2,
        inputs=(state, stored, values, beta, hidden),
        in_specs=(
            block(width),
            whole(stored),
            whole(values),
            pl.BlockSpec((None, 1, 1), lambda b, h, n: (h, 0, 0)),
            pl.BlockSpec((None, *hidden.shape[1:]), lambda b, h, n: (b, 0, 0)),
        ),
        outputs=(out,),
        out_specs=(block(values.shape[3]),),
        scratch=(),
        interpret=interpret,
    )
    return out[:, :, :count]


def _kernel(steps, state, stored, values, beta, hidden, out):
    x, v, scale, below = stored[...], values[...], beta[...], hidden[...]

    def read(xi, of):
        scores = scale * _dot(xi.astype(x.dtype), x, 1) + below
        exponential = jnp.exp(scores - jnp.max(scores, axis=1, keepdims=True))
        return _dot(exponential.astype(of.dtype), of, 0) / jnp.sum(exponential, axis=1, keepdims=True)

    xi = state[...].astype(accumulator(x.dtype))
    for _ in range(steps - 1):
        xi = read(xi, x)
    out[...] = read(xi, v)


def _dot(a, b, axis):
    sums = accumulator(b.dtype)
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision(b), preferred_element_type=sums)
