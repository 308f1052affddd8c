"""Runs any test-time memory over a row, one block of the chunk grid at a time.

There are two kinds of update. If the update is linear in the gradient (`Rule.linear`), every token has its own memory
in the exact dual form: with the coefficients A, B, C of `coefficients`, each matrix of the memory acts on u_t as

    u_t W_t = A_t u_t W_0 + B_t u_t S_0 - sum_{i<=t} C[t,i] (u_t . x_i) delta_i.

Otherwise (Newton-Schulz, norms, softmax) the memory changes at the ends of chunks, and the sums over the chunk's tokens
are carried until then. Gradients delta come from automatic differentiation of structure and loss, at the memory at the
start of the chunk. The outer gradient flows through all of this.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from engrax.layers.common.segments import select_rows
from engrax.layers.test_time.coefficients import Coefficients, Gates, coefficients
from engrax.layers.test_time.losses import inner_loss
from engrax.layers.test_time.retention import effective, newton_schulz, retain
from engrax.layers.test_time.rule import Matrices, Rule
from engrax.layers.test_time.structures import Extra
from engrax.pallas_kernels.common.segments import mask_tokens, row_lengths, segment_starts
from engrax.pallas_kernels.neural_memory.grid import aligned_grid, from_blocks, phased_grid, to_blocks


class Tail(NamedTuple):
    """The last c - 1 tokens of the row's segment, the newest last; weight -1 where there is none."""

    k: Float[Array, "B H _ K"]
    v: Float[Array, "B H _ V"]
    delta: Float[Array, "B H _"]
    weight: Float[Array, "B H _"]


class Previous(NamedTuple):
    """The key of the row's last token, for memories that store the next value; there: it was not padding."""

    k: Float[Array, "B H K"]
    there: Bool[Array, " B"]


class Pending(NamedTuple):
    """Sums over the chunk's tokens (those of its last segment) that are not yet in the memory."""

    steps: Matrices  # their sum, forgotten on the way; {} where Newton-Schulz takes the momentum instead
    keep: Float[Array, "B H"]  # the product of their (1 - forget)
    rates: Float[Array, "B H"]  # the sum of their learning rates
    tokens: Float[Array, "B H"]  # how many they are


class MemoryState(NamedTuple):
    """The state of a test-time memory; its size does not depend on T.

    stored: the memory; momenta: S^1 to S^n; anchor: the memory as the chunk began, for linear rules; pending: for the
    others. position: tokens of the row so far, modulo the chunk (or the span between two periodic resets).
    """

    stored: Matrices
    momenta: tuple[Matrices, ...]
    anchor: Matrices
    pending: Pending | tuple[()]
    tail: Tail | tuple[()]
    previous: Previous | tuple[()]
    position: Int[Array | np.ndarray, " B"]


class Block(NamedTuple):
    """The scan's inputs: tokens `[B, H, S, ...]` and properties of the block, by row."""

    q: Float[Array, "B H S K"]
    k: Float[Array, "B H S K"]
    v: Float[Array, "B H S V"]
    gates: Gates
    real: Bool[Array, "B S"]
    start: Bool[Array, "B S"] | None
    ends: Bool[Array, "B S"]  # the token completes its chunk
    fresh: Bool[Array, " B"]  # the block begins its chunk
    resets: Bool[Array, " B"] | None  # a periodic reset comes before the block


def start_state(rule: Rule, matrices: Matrices, batch_size: int, momenta: tuple[Matrices, ...] = ()) -> MemoryState:
    """Returns the state at phase 0 whose rows all hold `matrices` and `momenta` (none: zeros), `[H, I, O]` each.

    The position is a NumPy array, known when a program is traced: rows need one block less than at unknown phases.
    """
    rows = partial(jax.tree.map, lambda m: jnp.broadcast_to(m, (batch_size, *m.shape)))
    some = next(iter(matrices.values()))
    heads, dtype = some.shape[0], some.dtype
    zeros = partial(jnp.zeros, dtype=dtype)
    stored = rows(matrices)
    nothing = jax.tree.map(jnp.zeros_like, stored)
    by_head = (batch_size, heads)
    pending, tail = (), ()
    if not rule.linear:
        steps = nothing if rule.accumulates else {}
        pending = Pending(steps, zeros(by_head) + 1, zeros(by_head), zeros(by_head))
    if rule.window > 1:
        lead = (*by_head, rule.window - 1)
        keys, values = zeros((*lead, rule.structure.key)), zeros((*lead, rule.structure.value))
        tail = Tail(keys, values, zeros(lead), zeros(lead) - 1)
    momenta = rows(momenta) or (nothing,) * rule.momentum_order
    previous = Previous(zeros((*by_head, rule.structure.key)), np.zeros(batch_size, bool)) if rule.next_value else ()
    position = np.zeros(batch_size, np.int32)
    return MemoryState(stored, momenta, stored if rule.linear else {}, pending, tail, previous, position)


def run(
    rule: Rule,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    state: MemoryState,
    reset: MemoryState | None,
    segment_ids: Int[Array, "B T"] | None,
    extra: dict[str, Float[Array, "H V"]],
) -> tuple[Float[Array, "B T H V"], MemoryState]:
    """Writes and reads every token.

    reset: the initial state of new segments and after periodic resets, for one row; None if there are none.
    """
    (batch, length), size = q.shape[:2], rule.chunk_size
    aligned = isinstance(state.position, np.ndarray) and not state.position.any()
    position = jnp.asarray(state.position, jnp.int32)
    phase = position % size
    lengths = None if segment_ids is None else row_lengths(segment_ids)
    grid = aligned_grid(batch, length, size, lengths) if aligned else phased_grid(phase, length, size, lengths)
    held = jnp.sum(grid.holds[:, :, 0], axis=-1)  # [N, B]
    begin = position + jnp.cumsum(held, axis=0) - held
    places = begin[..., None] + jnp.cumsum(grid.holds[:, :, 0], axis=-1)  # tokens up to and with the slot
    real, start = grid.holds[:, :, 0], None
    if segment_ids is not None:
        q, k, v, gates = jax.tree.map(partial(mask_tokens, segment_ids >= 0), (q, k, v, gates))
        real = real & to_blocks(grid, (segment_ids >= 0)[:, :, None])[:, :, 0]
        start = real & to_blocks(grid, segment_starts(segment_ids)[:, :, None])[:, :, 0]
    fresh = (held > 0) & (begin % size == 0)
    q, k, v, gates = jax.tree.map(partial(to_blocks, grid), (q, k, v, gates))
    blocks = Block(
        q,
        k,
        v,
        gates,
        real,
        start,
        ends=grid.holds[:, :, 0] & (places % size == 0),
        fresh=fresh,
        resets=fresh & (begin % (size * rule.reset_every) == 0) if rule.reset_every and reset is not None else None,
    )

    def body(carry, block):
        if block.resets is not None:
            carry = select_rows(
                block.resets, jax.tree.map(lambda a, b: jnp.broadcast_to(a, b.shape), reset, carry), carry
            )
        if rule.linear:
            carry = carry._replace(anchor=select_rows(block.fresh, carry.stored, carry.anchor))
        one = partial(_block, rule)
        per_head = jax.vmap(one, in_axes=(0, 0, Block(0, 0, 0, 0, None, None, None, None, None), 0))
        return jax.vmap(per_head, in_axes=(0, None, 0, None))(carry, jax.tree.map(lambda x: x[0], reset), block, extra)

    carry, reset = (s and s._replace(position=(), previous=()) for s in (state, reset))
    carry, out = jax.lax.scan(jax.checkpoint(body), carry, blocks)
    out = from_blocks(grid, jnp.where(real[:, :, None, :, None], out, 0), length)
    position = (position + (length if lengths is None else lengths)) % (size * max(rule.reset_every, 1))
    return out, carry._replace(previous=state.previous, position=position)


# ---------------------------------------------------------------------------------------------------------------------
# One head of one row in one block


def _block(rule: Rule, carry: MemoryState, reset: MemoryState | None, block: Block, extra: Extra):
    """Returns the carry after the block and its output [S, V]."""
    tail = carry.tail or Tail(block.k[:0], block.v[:0], block.gates.delta[:0], block.gates.weight[:0])
    c = coefficients(
        block.gates,
        block.real,
        block.start,
        tail.weight,
        window=rule.window,
        decayed=rule.decayed,
        read_first=rule.read_first,
    )
    keys = [jnp.concatenate(pair) for pair in ((tail.k, block.k), (tail.v, block.v), (tail.delta, block.gates.delta))]
    step = _linear_step if rule.linear else _chunk_end_step
    carry, out = step(rule, c, carry, [carry, reset][: 1 + (block.start is not None)], block, keys, extra)
    if rule.window > 1:
        carry = carry._replace(tail=_next_tail(tail, block, c.segment))
    return carry, out


def _mixed(x, scales, matrices):
    """Returns sum_r (x * scales[:, r]) W_r; scales None: x W, the only one."""
    if scales is None:
        return x @ matrices[0]
    return sum((x * scales[:, r]) @ w for r, w in enumerate(matrices))


def _gradients(rule: Rule, anchors: list[Matrices], at, k, v, delta, extra: Extra):
    """Returns every matrix's inputs x and the gradients at its outputs, for all tokens: grad_i = x_i^T delta_i."""

    def loss(taps):
        inputs = {}

        def linear(name, x):
            inputs[name] = x
            return _mixed(x, at, [a[name] for a in anchors]) + taps[name]

        predicted = rule.structure.apply(linear, k, extra)
        return jnp.sum(inner_loss(rule.loss, predicted, v, delta, rule.loss_power)), inputs

    taps = {name: jnp.zeros((k.shape[0], o), k.dtype) for name, (_, o) in rule.structure.widths().items()}
    deltas, inputs = jax.grad(loss, has_aux=True)(taps)
    return inputs, deltas


def _momenta(c: Coefficients, bases: list[MemoryState], xs, deltas) -> tuple[Matrices, ...]:
    """Returns S^1 to S^n after the block."""
    found = []
    for held, write in c.last_momenta:

        def momentum(name, held=held, write=write):
            old = sum(held[j, r] * s[name] for r, base in enumerate(bases) for j, s in enumerate(base.momenta))
            return old - (write[:, None] * xs[name]).T @ deltas[name]

        found.append({name: momentum(name) for name in xs})
    return tuple(found)


def _total(c: Coefficients, totals: list[Matrices], bases: list[MemoryState], xs, deltas) -> Matrices:
    """Returns `totals` (by base) with the block's steps added: the carry of the dual form."""

    def matrix(name):
        total = sum(c.last.weights[r, :, None] * w[name] for r, w in enumerate(totals))
        for r, base in enumerate(bases):
            total += sum(c.last.momenta[m, r, :, None] * s[name] for m, s in enumerate(base.momenta))
        return total - (c.last.write * xs[name]).T @ deltas[name]

    return {name: matrix(name) for name in xs}


def _linear_step(rule: Rule, c: Coefficients, carry, bases, block: Block, keys, extra):
    anchors = [bases[0].anchor, *(base.stored for base in bases[1:])]
    xs, deltas = _gradients(rule, anchors, c.anchor, *keys, extra)

    def read(name, u):
        y = _mixed(u, c.read.weights, [base.stored[name] for base in bases])
        for m in range(rule.momentum_order):
            y += _mixed(u, c.read.momenta[:, m], [base.momenta[m][name] for base in bases])
        if c.read.write.shape[-1] == 1:
            scores = c.read.write[..., 0] * (u @ xs[name].T)
        else:
            scores = jnp.einsum("tec,tc,ec->te", c.read.write, u, xs[name])
        return y - scores @ deltas[name]

    out = rule.structure.apply(read, block.q, extra)
    stored = _total(c, [base.stored for base in bases], bases, xs, deltas)
    anchor = _either(c.segment[-1] > 0, bases[-1].stored, carry.anchor)
    return carry._replace(stored=stored, momenta=_momenta(c, bases, xs, deltas), anchor=anchor), out


def _either(flag, a, b):
    return jax.tree.map(lambda x, y: jnp.where(flag, x, y), a, b)


def _chunk_end_step(rule: Rule, c: Coefficients, carry, bases, block: Block, keys, extra):
    read_from = partial(jax.tree.map, lambda w: effective(rule.retention, w, rule.norm_power))
    weights = [read_from(base.stored) for base in bases]
    xs, deltas = _gradients(rule, weights, c.anchor, *keys, extra)
    momenta = _momenta(c, bases, xs, deltas)
    began, before = c.segment[-1] > 0, carry.pending
    mine = block.real & (c.segment == c.segment[-1])
    pending = Pending(
        steps=_total(c, [base.pending.steps for base in bases], bases, xs, deltas) if rule.accumulates else {},
        keep=sum(c.last.weights[r, 0] * base.pending.keep for r, base in enumerate(bases)),
        rates=jnp.where(began, 0, before.rates) + jnp.sum(jnp.where(mine, block.gates.lr, 0)),
        tokens=jnp.where(began, 0, before.tokens) + jnp.sum(mine, dtype=before.tokens.dtype),
    )
    stored = _either(began, bases[-1].stored, carry.stored)
    carry = carry._replace(stored=stored, momenta=momenta, pending=pending)
    after = update(rule, carry)
    ends = jnp.any(block.ends)
    at = c.anchor
    if not rule.read_first:  # the token that completes the chunk reads the new memory
        weights.append(read_from(after.stored))
        at = jnp.ones((len(block.k), 1, 1), block.k.dtype) if at is None else at[rule.window - 1 :]
        at = jnp.concatenate([at, jnp.zeros_like(at[:, :1])], axis=1)
        at = jnp.where(block.ends[:, None, None], jnp.zeros(len(weights)).at[-1].set(1)[:, None], at).astype(
            block.k.dtype
        )
    elif at is not None:
        at = at[rule.window - 1 :]
    out = rule.structure.apply(lambda name, u: _mixed(u, at, [w[name] for w in weights]), block.q, extra)
    return _either(ends, after, carry), out


def update(rule: Rule, state: MemoryState) -> MemoryState:
    """Ends the chunk of one head: adds the pending sums to the memory. Linear rules have none."""
    if rule.linear:
        return state
    pending = state.pending
    steps = pending.steps if rule.accumulates else state.momenta[-1]
    if rule.muon:
        rate = pending.rates / jnp.maximum(pending.tokens, 1)
        steps = jax.tree.map(lambda s: rate * newton_schulz(s), steps)
    stored = {name: retain(rule.retention, w, pending.keep, steps[name]) for name, w in state.stored.items()}
    blank = jax.tree.map(jnp.zeros_like, pending)._replace(keep=jnp.ones_like(pending.keep))
    return state._replace(stored=stored, pending=blank)


def close(rule: Rule, state: MemoryState) -> MemoryState:
    """Returns the state of one row with its chunk ended at the current position, at phase 0, without earlier tokens."""
    state = jax.vmap(jax.vmap(partial(update, rule)))(state._replace(tail=(), previous=(), position=()))
    return spread(rule, state, 1)


def spread(rule: Rule, state: MemoryState, batch_size: int) -> MemoryState:
    """Returns the matrices of the first row in every row, at phase 0."""
    stored, momenta = jax.tree.map(lambda leaf: leaf[0], (state.stored, state.momenta))
    return start_state(rule, stored, batch_size, momenta)


def at_place_of(state: MemoryState, other: MemoryState) -> MemoryState:
    """Returns the state at the other's position in the row's chunk grid."""
    return state._replace(position=other.position)


def matrices(state: MemoryState) -> tuple[Matrices, tuple[Matrices, ...]]:
    """Returns the memory and its momenta."""
    return state.stored, state.momenta


def _next_tail(tail: Tail, block: Block, segment) -> Tail:
    """Returns the last c - 1 real tokens of the block's last segment."""
    of_last = jnp.concatenate([jnp.broadcast_to(segment[-1] == 0, tail.weight.shape), segment == segment[-1]])
    there = jnp.concatenate([tail.weight >= 0, block.real]) & of_last
    newest = jnp.argsort(there, stable=True)[block.k.shape[0] :]
    new = Tail(block.k, block.v, block.gates.delta, block.gates.weight)
    joined = jax.tree.map(lambda old, x: jnp.concatenate([old, x])[newest], tail, new)
    joined = jax.tree.map(lambda x: jnp.where(there[newest].reshape(-1, *[1] * (x.ndim - 1)), x, 0), joined)
    return joined._replace(weight=jnp.where(there[newest], joined.weight, -1))
