"""The wrapper of the one-layer and two-layer GPU kernels: chunks with segments, and two passes split over a mesh.

The kernels can begin a chunk with the carried state or with the reset state, but not both in one chunk. So if a segment
begins inside a chunk, after the chunk's first slot, every chunk of the call is visited twice: first with the tokens on
the carried state, then with those on the reset state; the others neither write nor read. The second visit of a chunk in
which no segment begins changes nothing. This takes twice the time. It happens only in calls (on a mesh: on devices)
whose segment ids need it, chosen at run time.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK
from engrax.pallas_kernels.neural_memory.gpu_kernels import LAST, TABLE_ROWS, WRITE, PackedTokens

_TOKENS, _OUT = PackedTokens("BTHK", "BTHK", "BTHV", "NBHCC", "NBHRC"), "BTHV"  # axes, for `shard_over_batch_and_heads`
_IDLE = np.zeros((TABLE_ROWS, CHUNK), np.float32)  # the table of a chunk that changes nothing: A and P are 1
_IDLE[LAST, [0, 2]] = 1


class FinalMatrices(NamedTuple):
    """Matrices in a kernel's layout: `[B, H, K, V]`, or as tiles `[B, H, 2 tiles, 64, 64]`."""

    weights: jax.Array
    momentum: jax.Array
    anchor: jax.Array


class MatrixPasses(NamedTuple):
    """The passes of the kernels over chunks that begin with their anchors.

    forward(plan, tokens, begun, weights, momentum, reset) -> (out, FinalMatrices); backward(plan, tokens, begun,
    weights, momentum, reset, out_bar, bars) -> the cotangents of tokens, weights, momentum and reset. Only inputs are
    saved. begun `[N, B, C]`: see `vjp.Blocks`; with it, the tokens have two tables, for the carried and for the reset
    state. reset: its weights and momentum. Both are None without segments.
    """

    forward: Callable
    backward: Callable


def by_chunks(forward: Callable, backward: Callable, matrix: str) -> MatrixPasses:
    """Returns the passes made of one device's passes without `begun`; matrix: a matrix's axes."""
    state = (matrix, matrix, matrix)
    inputs, outputs = (_TOKENS, "NBC", *state), (_OUT, FinalMatrices(*state))

    def run(plan, *arrays):
        return shard_over_batch_and_heads(partial(_forward, forward, plan), inputs, outputs)(*arrays)

    def run_backward(plan, *arrays):
        split = shard_over_batch_and_heads(partial(_backward, backward, plan), (*inputs, *outputs), (_TOKENS, *state))
        return split(*arrays)

    return MatrixPasses(run, run_backward)


def _forward(run: Callable, plan, tokens: PackedTokens, begun, *matrices):
    if begun is None:
        return run(plan, tokens, *matrices)

    def twice():
        out, final = run(plan, _twice(begun, tokens), *matrices)
        return _unrepeat(out), final

    return lax.cond(_needs_two(begun), twice, lambda: run(plan, _once(begun, tokens), *matrices))


def _backward(run: Callable, plan, tokens: PackedTokens, begun, *rest):
    if begun is None:
        return run(plan, tokens, *rest)
    *matrices, out_bar, bars = rest

    def visit(layout, out_bar):
        chunks, pull = jax.vjp(partial(layout, begun), tokens)
        chunks_bar, *matrices_bar = run(plan, chunks, *matrices, out_bar, bars)
        return pull(chunks_bar)[0], *matrices_bar

    return lax.cond(_needs_two(begun), lambda: visit(_twice, _repeat(out_bar)), lambda: visit(_once, out_bar))


def _needs_two(begun):
    """Whether a segment begins inside a chunk, after its first slot."""
    return jnp.any(begun[..., -1] & ~begun[..., 0])


def _tables(begun, tokens: PackedTokens):
    """Returns the tables for the carried and for the reset state, and whether a segment begins in each chunk."""
    return *jnp.split(tokens.table, 2, axis=-2), begun[:, :, None, None, -1:]


def _once(begun, tokens: PackedTokens) -> PackedTokens:
    carried, reset, begins = _tables(begun, tokens)
    return tokens._replace(table=jnp.where(begins, reset, carried))


def _twice(begun, tokens: PackedTokens) -> PackedTokens:
    carried, reset, begins = _tables(begun, tokens)
    of_last_slot, own = np.arange(TABLE_ROWS)[:, None] >= WRITE, begun[:, :, None, :, None]
    tables = jnp.where(begins & of_last_slot, 0, carried), jnp.where(begins, reset, _IDLE)
    writes = jnp.where(own, 0, tokens.write), jnp.where(own, tokens.write, 0)
    write, table = (jnp.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:]) for pair in (writes, tables))
    return PackedTokens(*map(_repeat, tokens[:3]), write, table)


def _repeat(x):
    """Returns `[B, T, H, D]` with every chunk twice, `[B, 2 T, H, D]`."""
    batch, length, *rest = x.shape
    chunks = x.reshape(batch, -1, 1, CHUNK, *rest)
    return jnp.broadcast_to(chunks, (batch, length // CHUNK, 2, CHUNK, *rest)).reshape(batch, 2 * length, *rest)


def _unrepeat(x):
    """Returns the sums of the two visits; every token is zero in one of them."""
    batch, length, *rest = x.shape
    return x.reshape(batch, -1, 2, CHUNK, *rest).sum(axis=2).reshape(batch, length // 2, *rest)
