"""Parts that the Mosaic GPU kernels (sm_90) share: blocks in shared memory, products, masks and decays of a chunk.

A kernel's program is one warpgroup. Matrices are register values in the layout of the matrix unit; its operands lie in
shared memory (SMEM) in tiles that it and the copy engine understand. Both operands of a product are read from there,
also where registers would do: the interpreter knows no other form.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayShapes

CHUNK = 64  # tokens of a chunk: the rows of one instruction of the matrix unit
COLUMNS = 64  # columns of a state per program
SIZES = (64, 128)  # the numbers of features that the kernels serve
SMEM_BYTES = 224 * 2**10  # for a program's arrays, of the 227 KiB that it may have
MOST_PROGRAMS = 65535  # along the second and third axis of a grid
MASKED = -1e30  # a log decay whose exponential is 0; finite, so that no difference of two is NaN
HI, LO, SINCE_START, TO_END, WHOLE, POSITION, FACTOR = range(7)  # rows of the packed gates

MATRIX = plgpu.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # vectors that go along the rows or along the columns


def unsupported_sizes(shapes: LogDecayShapes) -> str | None:
    """Returns why the kernels of the log-decay operations cannot serve a call of these sizes, None where they can."""
    if shapes.segments:
        return "the GPU kernel has no states per segment"
    if shapes.dtype != jnp.bfloat16:
        return f"the GPU kernel takes bfloat16 q, k and v, not {shapes.dtype}"
    if shapes.key not in SIZES or shapes.value not in SIZES:
        return f"the GPU kernel takes K and V of {SIZES[0]} or {SIZES[1]}, not {shapes.key} and {shapes.value}"
    if shapes.chunk != CHUNK:
        return f"the GPU kernel takes chunks of {CHUNK} tokens, not {shapes.chunk}"
    if max(shapes.batch, shapes.heads) > MOST_PROGRAMS:
        return f"the GPU kernel takes at most {MOST_PROGRAMS} rows and heads"
    return None


def pack_gates(decay: Decay | None, reverse: bool = False, factor: jax.Array | None = None) -> jax.Array | None:
    """Returns `[B, H, N, 6 or 7, C]` float32: hi, lo, the decays of a row, of a write and (repeated) of the chunk, and
    the position in the chunk.

    decay: `[B, T, H]`, cumulative inside chunks of `CHUNK` tokens. A sweep forwards decays rows by what lies between
    the chunk's start and them, and writes by what lies between them and its end; a sweep backwards the other way round.
    factor: a further number for each token `[B, T, H]`.
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
    """Returns how a matrix of this dtype lies in SMEM."""
    return plgpu.TilingTransform((8, 128 // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(128)


def matrix(rows: int, columns: int, dtype=jnp.bfloat16):
    """Returns a matrix in SMEM."""
    return plgpu.SMEM((rows, columns), dtype, transforms=tiles(dtype))


def token_block(array, sweep, batch, head, features: int, block=0):
    """Returns a reference to one head's tokens in `[B, T, H, features]` and how their chunks arrive in SMEM.

    sweep: has `heads`, of which those of the array are a divisor, and `at(step)`, the chunk that is visited at a step.
    """
    ref = array.at[batch, :, head // (sweep.heads // array.shape[2])]
    shape, transforms = (CHUNK, features), tiles(array.dtype)
    return ref, plgpu.BlockSpec(shape, lambda step: (sweep.at(step), block), transforms=transforms)


def gate_blocks(gates, sweep, batch, head) -> list:
    """Returns the same for the packed gates, twice: the compiler takes minutes to find the layouts of one copy in SMEM
    that is read along rows and along columns."""
    spec = plgpu.BlockSpec((None, *gates.shape[3:]), lambda step: (sweep.at(step), 0, 0))
    return [(gates.at[batch, head], spec)] * 2


def state_block(states, sweep, batch, head, column):
    """Returns the same for one block of columns of states by chunk, `[B, H, N, D, E]`."""
    shape = (None, states.shape[3], COLUMNS)
    spec = plgpu.BlockSpec(shape, lambda step: (sweep.at(step), 0, column), transforms=tiles(states.dtype))
    return states.at[batch, head], spec


def keep(scratch, state, row: int, block):
    """Keeps 64 rows of the state from a row on, rounded where the matrix unit reads them. Returns the state so far.

    The exact state is a tuple of values, or lies in SMEM where the scratch has room for it.
    """
    scratch["state"][pl.ds(row, 64), :] = block.astype(jnp.bfloat16)
    if not scratch["exact_state"]:
        return (*state, block)
    scratch["exact_state"][0][pl.ds(row, 64), :] = block
    return state


def kept(scratch, state, row: int):
    """Returns 64 rows of the state from a row on."""
    if not scratch["exact_state"]:
        return state[row // 64]
    return load_matrix(scratch["exact_state"][0].at[pl.ds(row, 64), :])


def products(*operands):
    """Returns float32 products of matrices in SMEM, started together: of a pair each, or sums over a list of pairs."""
    sums = [terms if isinstance(terms, list) else [terms] for terms in operands]

    def run(*accumulators):
        for accumulator, terms in zip(accumulators, sums):
            for a, b in terms:
                plgpu.wgmma(accumulator, a, b)
        return tuple(accumulator[...] for accumulator in accumulators)

    shapes = [(terms[0][0].shape[0], terms[0][1].shape[1]) for terms in sums]
    return pl.run_scoped(run, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))


def split(targets, x):
    """Stores a float32 matrix in SMEM as the sum of as many in bfloat16 as there are targets, the largest first."""
    for target in targets:
        part = x.astype(jnp.bfloat16)
        target[...] = part
        x = x - part.astype(jnp.float32)


def pairs(a, b) -> list:
    """Returns the pairs of parts (see `split`) whose products add up to that of the sums: those that are not smaller
    than what the parts leave out."""
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

    gates: the two copies of the packed gates. Positions that are read from them are not kept in registers from chunk to
    chunk, as the compiler keeps a mask that it can compute beforehand.
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
    """Returns (I + A)^-1 as `inverse.ladder_inverse` does; A float32 in SMEM: registers are what is scarce.

    left and right: room for the two parts of a matrix each.
    """
    row, column = (plgpu.broadcasted_iota(jnp.int32, a.shape, axis, layout=MATRIX) for axis in (0, 1))

    def corner(level):  # the lower left block of every pair of blocks of 2^level rows
        pair = (column >> level) == (row >> level) - 1
        return jnp.where(pair & (((row >> level) & 1) == 1), load_matrix(a), 0.0)

    x = jnp.where(row == column, 1.0, 0.0) - corner(0)
    for level in range(1, CHUNK.bit_length() - 1):
        split(left, x)
        split(right, corner(level))
        plgpu.commit_smem()
        (first,) = products(pairs(left, right))
        plgpu.commit_smem()  # all warps' products have read the right operand, which is overwritten
        split(right, first)
        plgpu.commit_smem()
        (second,) = products(pairs(right, left))
        plgpu.commit_smem()
        x = x - second
    return x
