"""The scan over blocks with its hand-written derivative: what is saved and what is recomputed.

Blocks run in groups, and the state at the start of every group is saved. With `keep_rows`, each block's hidden rows
(`chunk.Saved`) are saved too, and the backward pass computes the states inside a group from them. Otherwise it
recomputes the group.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from engrax.pallas_kernels.dispatch import Choice
from engrax.pallas_kernels.neural_memory.chunk import Bases, Saved, chunk_backward, chunk_forward, chunk_replay, outer
from engrax.pallas_kernels.neural_memory.gates import Coefficients
from engrax.pallas_kernels.neural_memory.types import Layers

Carry = tuple[Layers, Layers, Layers]  # weights, momentum, anchor: [B, H, I, O] per layer
Reset = tuple[Layers, Layers] | None  # weights, momentum: [B, H, I, O] per layer
# Short blocks mostly move their state. So up to SHORT_GROUP of them, LONG_BLOCK tokens together, share one saved state,
# even at save_every = 1.
SHORT_GROUP, LONG_BLOCK = 4, 64


class Blocks(NamedTuple):
    """The scanned arrays.

    fresh: the block begins its chunk (None: all do). begun: the slot's segment began inside the block, from the reset
    state (None: no segments).
    """

    coefficients: Coefficients
    first_scores: Float[Array, "N B H S S"]
    q: Float[Array, "N B H S K"]
    k: Float[Array, "N B H S K"]
    v: Float[Array, "N B H S V"]
    fresh: Bool[Array, "N B"] | None
    begun: Bool[Array, "N B S"] | None

    @property
    def begins(self) -> Bool[Array, "*N B"] | None:
        """Whether a segment begins inside the block."""
        return None if self.begun is None else self.begun[..., -1]


class ScanInputs(NamedTuple):
    """The inputs of every implementation of the scan."""

    blocks: Blocks
    carry: Carry
    reset: Reset


ScanOutputs = tuple[Float[Array, "N B H S V"], Carry]


def _outer(x, y):
    """Returns x^T y. On CPU, XLA's product with a transposed left side takes twice as long as transposing first."""
    return lax.platform_dependent(x, y, cpu=lambda x, y: lax.optimization_barrier(x.T) @ y, default=outer)


class ScanPlan(NamedTuple):
    """How the blocks run: `group` blocks between two saved states; keep_rows: see above.

    interpret: kernels are interpreted. aligned: blocks that do not begin their chunk are empty.
    """

    activation: str
    group: int
    keep_rows: bool
    interpret: bool = False
    aligned: bool = False

    @property
    def straight(self) -> bool:
        """Whether a group runs as straight-line code."""
        return self.group <= SHORT_GROUP

    def heads(self, function):
        """Maps a function of one row and head over rows and heads."""
        return jax.vmap(jax.vmap(partial(function, activation=self.activation, outer=_outer)))


def select_rows(rows, new, old):
    """Returns trees of `[B, H, I, O]`: the new values where `rows [B]` is True, else the old ones."""
    return jax.tree.map(lambda a, b: jnp.where(rows[:, None, None, None], a, b), new, old)


def mask_rows(rows, tree):
    """Returns the tree of `[B, H, I, O]` with zeros where `rows [B]` is False."""
    return jax.tree.map(lambda a: jnp.where(rows[:, None, None, None], a, 0), tree)


def _add(a, b):
    return jax.tree.map(jnp.add, a, b)


def _bases(carry: Carry, reset: Reset, fresh) -> Bases:
    weights, momentum, anchor = carry
    anchor = None if fresh is None else select_rows(fresh, weights, anchor)
    more = ((), ()) if reset is None else ((reset[0],), (reset[1],))
    return Bases((weights, *more[0]), (momentum, *more[1]), anchor)


def _next_carry(weights, momentum, bases: Bases, block: Blocks) -> Carry:
    anchor = bases.anchors[0]
    if block.begins is not None:
        anchor = select_rows(block.begins, bases.weights[1], anchor)
    return weights, momentum, anchor


def _run(plan: ScanPlan, reset: Reset, carry: Carry, block: Blocks):
    """Runs one block of all rows and heads. Returns the next carry, the block's output and its saved values."""
    bases = _bases(carry, reset, block.fresh)
    arrays = (block.coefficients, block.first_scores, block.q, block.k, block.v)
    (out, weights, momentum), saved = plan.heads(chunk_forward)(*arrays, bases)
    return _next_carry(weights, momentum, bases, block), out, saved


def _replay(plan: ScanPlan, reset: Reset, carry: Carry, block: Blocks, saved: Saved) -> Carry:
    """Returns the next carry from the block's saved values."""
    bases = _bases(carry, reset, block.fresh)
    weights, momentum = plan.heads(chunk_replay)(block.coefficients, block.k, bases, saved)
    return _next_carry(weights, momentum, bases, block)


def _run_bwd(plan: ScanPlan, reset: Reset, bars: Carry, reset_bar, carry: Carry, block: Blocks, saved: Saved, out_bar):
    """Derivative of `_run`. Returns cotangents of the carry before it, of the reset state so far, and of the block."""
    weights_bar, momentum_bar, anchor_bar = bars
    if block.begins is not None:
        reset_bar = (_add(reset_bar[0], mask_rows(block.begins, anchor_bar)), reset_bar[1])
        anchor_bar = mask_rows(~block.begins, anchor_bar)
    bases = _bases(carry, reset, block.fresh)
    arrays = (block.coefficients, block.first_scores, block.q, block.k)
    *block_bar, bases_bar = plan.heads(chunk_backward)(*arrays, bases, saved, (out_bar, weights_bar, momentum_bar))
    weights_bar, momentum_bar = bases_bar.weights[0], bases_bar.momentum[0]
    if block.fresh is None:
        weights_bar, anchor_bar = _add(weights_bar, anchor_bar), jax.tree.map(jnp.zeros_like, anchor_bar)
    else:
        anchor_bar = _add(anchor_bar, bases_bar.anchor)
        weights_bar = _add(weights_bar, mask_rows(block.fresh, anchor_bar))
        anchor_bar = mask_rows(~block.fresh, anchor_bar)
    if reset is not None:
        reset_bar = _add(reset_bar, (bases_bar.weights[1], bases_bar.momentum[1]))
    return (weights_bar, momentum_bar, anchor_bar), reset_bar, Blocks(*block_bar, None, None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan_blocks(plan: ScanPlan, blocks: Blocks, carry: Carry, reset: Reset):
    """Runs all blocks; their number is a multiple of `plan.group`. Returns (out `[N, B, H, S, V]`, final carry)."""

    def body(carry, block):
        carry, out, _ = _run(plan, reset, carry, block)
        return carry, out

    carry, out = lax.scan(body, carry, blocks)
    return out, carry


# For a short group, inputs and outputs are a tuple with one tree per block (straight-line code: nothing
# is stacked or sliced). For a long group, they are one tree of stacked arrays (a scan: the program does not grow).


def _part(tree, blocks: slice):
    return jax.tree.map(lambda x: x[blocks], tree)


def _split(plan: ScanPlan, tree):
    """Returns the blocks in groups: `[N / group, ...]` per block of the group, or `[N / group, group, ...]`."""
    if plan.straight:
        return tuple(_part(tree, slice(i, None, plan.group)) for i in range(plan.group))
    return jax.tree.map(lambda x: x.reshape(-1, plan.group, *x.shape[1:]), tree)


def _merge(plan: ScanPlan, trees):
    """Undoes `_split`."""
    if plan.straight:
        return jax.tree.map(lambda *x: jnp.stack(x, axis=1).reshape(-1, *x[0].shape[1:]), *trees)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), trees)


def _zip(plan: ScanPlan, *trees):
    return tuple(zip(*trees)) if plan.straight else trees


def _scan_group(plan: ScanPlan, body, carry, xs, reverse: bool = False):
    """`lax.scan` over the blocks of one group."""
    if not plan.straight:
        return lax.scan(body, carry, xs, reverse=reverse)
    ys = [None] * plan.group
    for i in reversed(range(plan.group)) if reverse else range(plan.group):
        carry, ys[i] = body(carry, xs[i])
    return carry, tuple(ys)


def _scan_fwd(plan: ScanPlan, blocks: Blocks, carry: Carry, reset: Reset):
    def body(carry, block):
        carry, out, saved = _run(plan, reset, carry, block)
        return carry, (out, saved if plan.keep_rows else None)

    def group(start, blocks):
        carry, ys = _scan_group(plan, body, start, blocks)
        return carry, (ys, start)

    blocks = _split(plan, blocks)
    final, (ys, starts) = lax.scan(group, carry, blocks)
    out, saved = zip(*ys) if plan.straight else ys
    return (_merge(plan, out), final), (blocks, starts, saved, reset)


def _scan_bwd(plan: ScanPlan, residuals, cotangents):
    blocks, starts, saved, reset = residuals
    out_bar, bars = cotangents

    def replay(start, inputs):
        block, saved = inputs
        if plan.keep_rows:
            return _replay(plan, reset, start, block, saved), (start, saved)
        carry, _, saved = _run(plan, reset, start, block)
        return carry, (start, saved)

    def body(carry, inputs):
        block, (start, saved), out_bar = inputs
        bars, reset_bar, block_bar = _run_bwd(plan, reset, *carry, start, block, saved, out_bar)
        return (bars, reset_bar), block_bar

    def group(carry, inputs):
        blocks, start, saved, out_bar = inputs
        _, replayed = _scan_group(plan, replay, start, _zip(plan, blocks, saved))
        return _scan_group(plan, body, carry, _zip(plan, blocks, replayed, out_bar), reverse=True)

    reset_bar = jax.tree.map(jnp.zeros_like, reset)
    inputs = (blocks, starts, saved, _split(plan, out_bar))
    (bars, reset_bar), blocks_bar = lax.scan(group, (bars, reset_bar), inputs, reverse=True)
    return _merge(plan, blocks_bar), bars, reset_bar


scan_blocks.defvjp(_scan_fwd, _scan_bwd)


def group_size(count: int, slots: int, save_every: int) -> int:
    """Returns how many of `count` blocks share one saved state."""
    if save_every > 1:
        return min(count, save_every)
    most = max(1, min(SHORT_GROUP, LONG_BLOCK // slots))
    return max(n for n in range(1, most + 1) if count % n == 0)


def run_blocks(
    blocks: Blocks, carry: Carry, reset: Reset, *, activation: str, save_every: int, aligned: bool, choice: Choice
) -> ScanOutputs:
    """Runs any number of blocks with the chosen implementations. Returns (out, final carry)."""
    count, slots = blocks.k.shape[0], blocks.k.shape[3]
    plan = ScanPlan(activation, group_size(count, slots, save_every), save_every == 1, choice.interpret, aligned)
    whole = count - count % plan.group
    out, carry = choice.run(plan, ScanInputs(_part(blocks, slice(whole)), carry, reset))
    if whole == count:
        return out, carry
    rest = ScanInputs(_part(blocks, slice(whole, None)), carry, reset)
    more, carry = choice.run(plan._replace(group=count - whole), rest)
    return jnp.concatenate([out, more]), carry
