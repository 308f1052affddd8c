"""The bodies of the neural memory's TPU kernels: one block of one row and head per step of the grid.

The mathematics is that of `chunk`, the same functions that the XLA form maps over rows and heads. Trees of references
and trees of values have the same structure. Letters as in `types`; P: slots padded to a multiple of 8.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from engrax.pallas_kernels.mosaic_tpu.parts import Refs, load, store, store_zeros
from engrax.pallas_kernels.neural_memory.chunk import Bases, chunk_backward, chunk_forward
from engrax.pallas_kernels.neural_memory.gates import Coefficients

# Rows of a block's table of gates: per base (carried, reset state), the anchor's factor, A and B; then E of
# the last slot; then, in the first lanes, P of the last slot per base and the flags fresh and begins.
ANCHOR, WEIGHTS, MOMENTUM, LAST_WRITE, REST = 0, 2, 4, 6, 7
FRESH, BEGINS = 2, 3


class MemoryForm(NamedTuple):
    """The static settings of the kernels.

    bases: 1, or 2 with a reset state. scaled: gradients are taken at multiples of the anchor. phased: blocks need not
    begin their chunks. group: blocks between two saved states.
    """

    activation: str
    bases: int
    scaled: bool
    phased: bool
    group: int
    interpret: bool


class PackedBlocks(NamedTuple):
    """The per-block arrays; padded slots come first, so that a block's last slot stays last."""

    table: Float[Array, "N B H 8 P"]
    write: Float[Array, "N B H P P"]
    first_scores: Float[Array, "N B H P P"]
    q: Float[Array, "N B H P K"]
    k: Float[Array, "N B H P K"]
    v: Float[Array, "N B H P V"]


def block_of_step(form: MemoryForm, i):
    """Returns the group's block for step i of the backward kernel: forward over all but the last, then back."""
    return jnp.where(i < form.group, i, 2 * form.group - 2 - i)


# By default, float32 products round to bfloat16, so both kernels are traced at the highest precision.


@jax.default_matmul_precision("highest")
def forward_kernel(form: MemoryForm, tokens, carry, reset, out, final, starts, scratch):
    """Grid (B, H, N). starts: None, or the carry before every group of blocks."""
    n = pl.program_id(2)

    @pl.when(n == 0)
    def _():
        store(scratch, load(carry))

    if starts is not None:

        @pl.when(lax.rem(n, form.group) == 0)
        def _():
            store(starts, load(scratch))

    state, out[...], anchor = _run_block(form, tokens, load(scratch), load(reset))
    store(scratch, state)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        store(final, (*state[:2], anchor))


@jax.default_matmul_precision("highest")
def backward_kernel(
    form: MemoryForm, tokens, starts, reset, out_bar, bars, tokens_bar, bars_out, reset_bar, states, carry
):
    """Grid (B, H, groups, steps), with groups from last to first.

    states: scratch for the carry before every block of the group; carry: scratch for the carry's cotangents.
    """
    group, i = pl.program_id(2), pl.program_id(3)
    block = block_of_step(form, i)

    @pl.when((group == 0) & (i == 0))
    def _():
        store(carry, load(bars))
        store_zeros(reset_bar)

    @pl.when(i == 0)
    def _():
        store(_at(states, 0), load(starts))

    @pl.when(i < form.group - 1)
    def _():
        state, *_ = _run_block(form, tokens, load(_at(states, block)), load(reset))
        store(_at(states, block + 1), state)

    @pl.when(i >= form.group - 1)
    def _():
        _run_block_bwd(form, tokens, load(_at(states, block)), load(reset), out_bar, tokens_bar, reset_bar, carry)

    @pl.when((group == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        store(bars_out, load(carry))


class _At:
    """One entry of the first axis of a reference."""

    def __init__(self, ref, index):
        self.ref, self.index = ref, index

    def __getitem__(self, _):
        return self.ref[self.index]

    def __setitem__(self, _, value):
        self.ref[self.index] = value


def _at(refs: Refs, index) -> Refs:
    return jax.tree.map(lambda ref: _At(ref, index), refs)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _choose(flag, new, old):
    """Returns `new` where the flag `[1, 1]` is positive, else `old`; None means zeros."""
    new, old = (jax.tree.map(jnp.zeros_like, y) if x is None else x for x, y in ((new, old), (old, new)))
    return jax.tree.map(lambda a, b: jnp.where(jnp.broadcast_to(flag, b.shape) > 0, a, b), new, old)


def _load_block(form: MemoryForm, tokens: Refs):
    """Returns the coefficients, the other inputs of `chunk_forward` and the flags (fresh, begins) of one block."""
    table, write, *rows = load(tokens)
    columns = table.T

    def by_base(row):
        return columns[:, row : row + form.bases]

    c = Coefficients(
        anchor=by_base(ANCHOR) if form.scaled else None,
        read_weights=by_base(WEIGHTS),
        read_momentum=by_base(MOMENTUM),
        write=write,
        last_momentum=table[REST, : form.bases],
        last_write=table[LAST_WRITE],
    )
    return c, rows, [table[REST : REST + 1, i : i + 1] for i in (FRESH, BEGINS)]


def _store_table_bar(form: MemoryForm, c: Coefficients, table: Refs) -> None:
    """Stores the coefficients' cotangents in the layout of the table."""
    store_zeros(table)
    for row, x in ((ANCHOR, c.anchor), (WEIGHTS, c.read_weights), (MOMENTUM, c.read_momentum)):
        if x is not None:
            table[row : row + form.bases, :] = x.T
    table[LAST_WRITE : LAST_WRITE + 1, :] = c.last_write[None]
    table[REST : REST + 1, : form.bases] = c.last_momentum[None]


def _bases(form: MemoryForm, carry, reset, fresh) -> Bases:
    weights, momentum, anchor = carry
    anchor = _choose(fresh, weights, anchor) if form.phased else None
    more = ((), ()) if reset is None else ((reset[0],), (reset[1],))
    return Bases((weights, *more[0]), (momentum, *more[1]), anchor)


def _run_block(form: MemoryForm, tokens: Refs, carry, reset):
    """Returns the carry after one block, its output, and the anchor of its last token."""
    c, rows, (fresh, begins) = _load_block(form, tokens)
    bases = _bases(form, carry, reset, fresh)
    (out, weights, momentum), _ = chunk_forward(c, *rows, bases, form.activation)
    anchor = bases.anchors[0]
    if reset is not None:
        anchor = _choose(begins, reset[0], anchor)
    return (weights, momentum, anchor if form.phased else ()), out, anchor


def _run_block_bwd(form: MemoryForm, tokens, state, reset, out_bar, tokens_bar: PackedBlocks, reset_bar, carry) -> None:
    """The derivative of `_run_block`, like `vjp._run_bwd`; `carry` holds the cotangents after, then before it."""
    c, (first_scores, q, k, v), (fresh, begins) = _load_block(form, tokens)
    weights_bar, momentum_bar, anchor_bar = load(carry)
    bases = _bases(form, state, reset, fresh)
    _, saved = chunk_forward(c, first_scores, q, k, v, bases, form.activation)
    if reset is not None:
        to_reset, anchor_bar = _choose(begins, anchor_bar, None), _choose(begins, None, anchor_bar)
    cotangents = (out_bar[...], weights_bar, momentum_bar)
    c_bar, *rows_bar, bases_bar = chunk_backward(c, first_scores, q, k, bases, saved, cotangents, form.activation)
    weights_bar, momentum_bar = bases_bar.weights[0], bases_bar.momentum[0]
    if form.phased:
        anchor_bar = _add(anchor_bar, bases_bar.anchor)
        weights_bar = _add(weights_bar, _choose(fresh, anchor_bar, None))
        anchor_bar = _choose(fresh, None, anchor_bar)
    else:
        weights_bar, anchor_bar = _add(weights_bar, anchor_bar), jax.tree.map(jnp.zeros_like, anchor_bar)
    store(carry, (weights_bar, momentum_bar, anchor_bar))
    if reset is not None:
        store(reset_bar, _add(load(reset_bar), (_add(bases_bar.weights[1], to_reset), bases_bar.momentum[1])))
    _store_table_bar(form, c_bar, tokens_bar.table)
    store(tuple(tokens_bar[1:]), (c_bar.write, *rows_bar))
