"""Shared parts of the Mosaic GPU kernels (sm_90): blocks in shared memory, products, masks and decays of a chunk.

A program is one warpgroup. Matrices are register values in the layout of the matrix unit. Its operands are in shared
memory (SMEM), tiled for the matrix unit and the copy engine. Both operands of a product are read from SMEM, even where
registers would do, because the interpreter supports no other form.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.common.decay import Decay

CHUNK = 64  # tokens of a chunk: the rows of one instruction of the matrix unit
COLUMNS = 64  # columns of a state per program
SIZES = (64, 128)  # supported numbers of features
SMEM_BYTES = 224 * 2**10  # for a program's arrays, out of the 227 KiB available
MOST_PROGRAMS = 65535  # along the second and the third axis of a grid
MASKED = -1e30  # a log decay whose exponential is 0; finite, so differences of two are never NaN
HI, LO, SINCE_START, TO_END, WHOLE, POSITION, FACTOR = range(7)  # rows of the packed gates

MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # vectors along the rows or along the columns


def pack_gates(decay: Decay | None, reverse: bool = False, factor: jax.Array | None = None) -> jax.Array | None:
    """Returns `[B, H, N, 6 or 7, C]` float32: hi, lo, the decays of a row, of a write and (repeated) of the chunk, and
    the position in the chunk.

    decay: `[B, T, H]`, cumulative inside chunks of `CHUNK` tokens. A forward sweep decays rows
    from the chunk's start to the row, and writes from the write to the chunk's end. A backward sweep does the reverse.
    factor: one more number per token, `[B, T, H]`.
    """
    if decay is None:
        return None
    batch, length, heads = decay.hi.shape
    others = [] if factor is None else [factor]
    hi, lo, *others = (x.astype(jnp.float32).reshape(batch, length // CHUNK, CHUNK, heads) for x in (*decay, *others))
    since_start = jnp.exp(hi + lo)
    to_end = jnp.exp((hi[:, :, -1:] - hi) + (lo[:, :, -1:] - lo))
    whole = jnp.broadcast_to(since_start[:, :, -1:], hi.shape)
    decays = (to_end, since_start) if reverse else (since_start, to_end)
    position = jnp.broadcast_to(jnp.arange(CHUNK, dtype=jnp.float32)[:, None], hi.shape)
    return jnp.stack([hi, lo, *decays, whole, position, *others], axis=2).transpose(0, 4, 1, 2, 3)


def tiles(dtype):
    """Returns the SMEM layout of a matrix of this dtype."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def matrix(rows: int, columns: int, dtype=jnp.bfloat16):
    """Returns a matrix in SMEM."""
    return plgpu.SMEM((rows, columns), dtype, transforms=tiles(dtype))


def own(head, heads: int, fewer: int):
    """Returns the one of `fewer` heads that this head of `heads` shares with its neighbours."""
    return head // (heads // fewer)


def token_block(array, sweep, batch, head, features: int, block=0):
    """Returns a reference to one head's tokens in `[B, T, H, features]` and the block spec that loads their chunks.

    sweep: has `heads`, a multiple of the array's heads, and `at(step)`, the chunk visited at a step.
    """
    ref = array.at[batch, :, own(head, sweep.heads, array.shape[2])]
    shape, transforms = (CHUNK, features), tiles(array.dtype)
    return ref, plgpu.BlockSpec(shape, lambda step: (sweep.at(step), block), transforms=transforms)


def chunk_block(array, place):
    """Returns the same for numbers per chunk, `[B, H, N, ...]`; place: a `pipeline.Place`."""
    ref = array.at[place.row, own(place.head, place.heads, array.shape[1])]
    zeros = (0,) * (array.ndim - 3)
    return ref, plgpu.BlockSpec((None, *array.shape[3:]), lambda step: (place.at(step), *zeros))


def gate_blocks(gates, place) -> dict:
    """Returns the same for the packed gates, twice: one copy is read along rows and one along columns.

    With a single copy, the compiler takes minutes to find its layouts in SMEM.
    """
    return {name: chunk_block(gates, place) for name in ("by_row", "by_column")}


def state_block(states, place):
    """Returns the same for the program's columns of the per-chunk states `[B, H, N, D, E]`."""
    shape = (None, states.shape[3], COLUMNS)
    spec = plgpu.BlockSpec(shape, lambda step: (place.at(step), 0, place.column), transforms=tiles(states.dtype))
    return states.at[place.row, place.head], spec


def keep(scratch, state, row: int, block):
    """Stores 64 rows of the state, starting at `row`, rounded for the matrix unit. Returns the state so far.

    The exact state is a tuple of values, or is in SMEM if the scratch has room for it.
    """
    scratch["state"][pl.ds(row, 64), :] = block.astype(jnp.bfloat16)
    if not scratch["exact_state"]:
        return (*state, block)
    scratch["exact_state"][0][pl.ds(row, 64), :] = block
    return state


def kept(scratch, state, row: int):
    """Returns 64 rows of the state, starting at `row`."""
    if not scratch["exact_state"]:
        return state[row // 64]
    return load_matrix(scratch["exact_state"][0].at[pl.ds(row, 64), :])


def products(*operands):
    """Returns float32 products of matrices in SMEM, started together: one per pair, or a sum per list of pairs."""
    sums = [terms if isinstance(terms, list) else [terms] for terms in operands]

    def run(*accumulators):
        for accumulator, terms in zip(accumulators, sums):
            for a, b in terms:
                plgpu.wgmma(accumulator, a, b)
        return tuple(accumulator[...] for accumulator in accumulators)

    shapes = [(terms[0][0].shape[0], terms[0][1].shape[1]) for terms in sums]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def split(targets, x):
    """Stores a float32 matrix in SMEM as a sum of bfloat16 matrices, one per target, the largest first."""
    for target in targets:
        part = x.astype(jnp.bfloat16)
        target[...] = part
        x = x - part.astype(jnp.float32)


def pairs(a, b) -> list:
    """Returns the pairs of parts (see `split`) whose products add up to the full product.

    Pairs smaller than the parts' own rounding error are dropped.
    """
    return [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < len(a)]


def transposed(ref):
    """Returns the transpose of a matrix in SMEM."""
    return ref.transpose((1, 0))


def load_matrix(ref):
    """Returns a matrix in SMEM as a float32 value."""
    return plgpu.load(ref, layout=MATRIX).astype(jnp.float32)


def along_rows(ref, columns: int = CHUNK):
    """Returns the vector in SMEM as a matrix that is constant along each row."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=BY_ROW), (ref.shape[0], columns), [0])


def along_columns(ref, rows: int = CHUNK):
    """Returns the vector in SMEM as a matrix that is constant along each column."""
    return lax.broadcast_in_dim(plgpu.load(ref, layout=BY_COLUMN), (rows, ref.shape[0]), [1])


def sum_columns(x):
    """Returns the sums along each row of a matrix."""
    return plgpu.layout_cast(jnp.sum(x, axis=1), BY_ROW)


def visible(reverse: bool, strict: bool, gates=None):
    """Returns the `[C, C]` mask of the tokens (columns) that a token (row) sees in the order of the sweep.

    gates: the two copies of the packed gates. With positions read from them, the compiler cannot compute the mask in
    advance and keep it in registers from chunk to chunk.
    """
    if gates is None:
        row, column = (plgpu.broadcasted_iota(jnp.int32, (CHUNK, CHUNK), axis, layout=MATRIX) for axis in (0, 1))
    else:
        row, column = along_rows(gates[0].at[POSITION]), along_columns(gates[1].at[POSITION])
    late, early = (column, row) if reverse else (row, column)
    return late > early if strict else late >= early


def decay_between(gates, reverse: bool, mask):
    """Returns the decay between two tokens of the chunk, `[C, C]`, 0 outside the mask."""
    hi, lo = (along_rows(gates[0].at[part]) - along_columns(gates[1].at[part]) for part in (HI, LO))
    between = -(hi + lo) if reverse else hi + lo
    return jnp.exp(jnp.where(mask, between, MASKED))


def ladder(a, left, right):
    """Returns (I + A)^-1 like `inverse.ladder_inverse`. A is float32 in SMEM because registers are scarce.

    left, right: scratch for the two parts of one matrix each.
    """
    row, column = (plgpu.broadcasted_iota(jnp.int32, a.shape, axis, layout=MATRIX) for axis in (0, 1))

    def corner(level):  # the lower left block of each pair of blocks of 2^level rows
        pair = (column >> level) == (row >> level) - 1
        return jnp.where(pair & (((row >> level) & 1) == 1), load_matrix(a), 0.0)

    x = jnp.where(row == column, 1.0, 0.0) - corner(0)
    for level in range(1, CHUNK.bit_length() - 1):
        split(left, x)
        split(right, corner(level))
        plgpu.commit_smem()
        (first,) = products(pairs(left, right))
        plgpu.commit_smem()  # all warps' products have read the right operand, overwritten below
        split(right, first)
        plgpu.commit_smem()
        (second,) = products(pairs(right, left))
        plgpu.commit_smem()
        x = x - second
    return x
