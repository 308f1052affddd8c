"""The gated delta rule for any device: groups of chunks in sequence; within a group, only the state is sequential.

Inside a group, everything that does not depend on the state is computed for all chunks at once, then the states chunk
by chunk (two products each), then the outputs. So temporary memory is that of one group, and the backward pass adds one
state per chunk.

Axes here: B rows, M chunks of a group, H query heads, R value heads per query head, C tokens of a chunk, K and V
features, N segments. Under one gate per channel, queries and keys differ between the value heads that share them, so H
is the number of value heads and R is 1. Rows and chunks share an axis, BM, because XLA's CPU backend aborts on products
of arrays with 8 axes, and halving the chunk and the caller's `jax.vmap` may add axes.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan
from engrax.pallas_kernels.common.matmul import emulated_on_cpu
from engrax.pallas_kernels.gated_delta_rule.chunk import (
    DeltaForm,
    DeltaTokens,
    adjoint,
    advance,
    chunk,
    local,
    output,
    retreat,
)
from engrax.pallas_kernels.gated_delta_rule.vjp import DeltaInputs, Residuals
from engrax.pallas_kernels.linear_attention.chunk import ScalarDecay
from engrax.pallas_kernels.passes import Passes

GROUP_CPU, GROUP = 32, 2048  # chunks times rows times value heads of a group: fits a cache; fills a GPU

State = Float[Array, "B *N H R K V"]
States = Float[Array, "BM H R K V"]
Segments = Int[Array, "BM"] | None


class Stream(NamedTuple):
    """The tokens of a group, not yet split into the columns and rows of `chunk.DeltaTokens`."""

    q: Float[Array, "BM H C K"]
    k: Float[Array, "BM H C K"]
    v: Float[Array, "BM H R C V"]
    beta: Float[Array, "BM H R C"]
    decay: Decay | None


class GroupGrid(NamedTuple):
    """How tokens are split: `groups` groups of whole chunks of `chunk` tokens, of `rows` rows.

    heads: H as above; copies: how many times a query head is repeated (1: not repeated).
    """

    groups: int
    chunk: int
    rows: int
    heads: int
    copies: int


def forward(plan: LogDecayPlan, inputs: DeltaInputs) -> tuple[LogDecayOutputs, Residuals]:
    """Returns (out, final state) and the inverses."""
    return _by_device(_forward, plan, inputs)


def backward(plan: LogDecayPlan, inputs: DeltaInputs, residuals: Residuals, cotangents: LogDecayOutputs) -> DeltaInputs:
    """Returns the cotangents of the inputs; the decay's is with respect to the cumulative sum."""
    return _by_device(_backward, plan, inputs, residuals, cotangents)


passes = Passes(forward, backward)


def _by_device(f, plan, inputs, *more):
    def branch(group, operands):
        return partial(f, DeltaForm(plan.scale, operands), _grid(plan, group, inputs))

    dtype = inputs.q.dtype
    return lax.platform_dependent(
        inputs, *more, cpu=branch(GROUP_CPU, emulated_on_cpu(dtype)), default=branch(GROUP, dtype)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The walk over groups


def _forward(form, grid, inputs):
    length = inputs.v.shape[1]
    inputs = _padded(grid, inputs)
    tokens = inputs._replace(state=None)
    state = _split_heads(grid, inputs.state)

    def step(carry, n):
        state, out, inverses = carry
        state, out_n, inverses_n = _group_forward(form, grid, *_of_group(grid, n, tokens), state)
        return (state, _put(grid, n, out, out_n), _put(grid, n, inverses, inverses_n)), None

    inverses = jnp.zeros((*inputs.v.shape[:3], grid.chunk), state.dtype)
    state, out, inverses = _walk(grid, step, (state, jnp.zeros_like(inputs.v), inverses))[0]
    return (out[:, :length], state.reshape(inputs.state.shape)), inverses[:, :length]


def _backward(form, grid, inputs, inverses, cotangents):
    length = inputs.v.shape[1]
    inputs = _padded(grid, inputs)
    tokens = inputs._replace(state=None)
    state = _split_heads(grid, inputs.state)
    inverses, out_bar = (_pad_tokens(grid, x) for x in (inverses, cotangents[0].astype(state.dtype)))
    state_bar = _split_heads(grid, cotangents[1])

    def advance_group(state, n):
        return _group_states(form, grid, *_of_group(grid, n, tokens), _take(grid, n, inverses), state)

    def step(carry, n_before):
        (n, before), (state_bar, bars) = n_before, carry
        taken = (_take(grid, n, x) for x in (inverses, out_bar))
        state_bar, bars_n = _group_backward(form, grid, *_of_group(grid, n, tokens), before, *taken, state_bar)
        return (state_bar, jax.tree.map(partial(_put, grid, n), bars, bars_n)), None

    _, before = _walk(grid, advance_group, state)
    bars = jax.tree.map(jnp.zeros_like, Stream(*tokens[:5]))
    (state_bar, bars), _ = _walk(grid, step, (state_bar, bars), before)
    bars = jax.tree.map(lambda x: x[:, :length], bars)
    return DeltaInputs(*bars, state_bar.reshape(inputs.state.shape), None)


def _walk(grid, step, carry, *xs):
    """Runs over the groups; backwards if `xs` are given, a forward walk's results for every group."""
    if grid.groups == 1:
        return step(carry, (0, *xs) if xs else 0)
    n = jnp.arange(grid.groups)
    return lax.scan(step, carry, (n, *xs) if xs else n, reverse=bool(xs))


# ---------------------------------------------------------------------------------------------------------------------
# One group


def _group_forward(form, grid, stream: Stream, segments: Segments, state: State):
    """Returns the state after the group, its outputs and its inverses."""
    part = _map(partial(local, form), stream)
    state, (before, written) = _run_states(form, grid, stream, part, segments, state)
    return state, _map(partial(output, form), stream, part.scores, written, before), part.inverse


def _group_states(form, grid, stream: Stream, segments: Segments, inverses, state: State):
    """Returns the state after the group and the states before its chunks."""
    part = _map(partial(local, form), stream, inverses)
    state, (before, _) = _run_states(form, grid, stream, part, segments, state)
    return state, before


def _group_backward(
    form, grid, stream: Stream, segments: Segments, before: States, inverses, out_bar, state_bar: State
):
    """Returns the cotangents of the state before the group and of its tokens."""
    part = _map(partial(local, form), stream, inverses)
    direct = _map(partial(adjoint, form), stream, part.scores, out_bar)
    state_bar, after_bar = _run_cotangents(form, grid, stream, part.w, direct, segments, state_bar)
    wide = jax.tree.map(lambda x: x.astype(out_bar.dtype), stream)  # avoids rounding between sums over value heads
    _, pull = jax.vjp(lambda stream: _map(partial(_chunk, form), stream, before, inverses), wide)
    (bars,) = pull((out_bar, after_bar))
    if grid.copies > 1:
        q_bar, k_bar = (x.reshape(x.shape[0], -1, grid.copies, *x.shape[2:]).sum(axis=2) for x in bars[:2])
        bars = bars._replace(q=q_bar, k=k_bar)
    if bars.decay is not None:
        bars = bars._replace(decay=Decay(jnp.zeros_like(bars.decay.lo), bars.decay.lo))
    return state_bar, bars


def _chunk(form, tokens, state, inverse):
    return chunk(form, tokens, state, inverse)[0]


def _run_states(form, grid, stream, part, segments, state):
    """Returns the state after the chunks of a group, and (state before, written) of every chunk."""

    def step(state, xs):
        stream, part, segment = xs
        before = _pick(state, segment)
        after, written = _map(partial(advance, form), stream, part, before)
        return _place(state, segment, after), (before, written)

    return _over_chunks(grid, step, state, (stream, part, segments))


def _run_cotangents(form, grid, stream, w, direct, segments, state_bar):
    """Returns the cotangents of the state before the chunks of a group, and of the state after every chunk."""

    def step(state_bar, xs):
        stream, w, direct, segment = xs
        after_bar = _pick(state_bar, segment)
        return _place(state_bar, segment, _map(partial(retreat, form), stream, w, direct, after_bar)), after_bar

    return _over_chunks(grid, step, state_bar, (stream, w, direct, segments), reverse=True)


def _over_chunks(grid, step, carry, xs, reverse=False):
    """`lax.scan` over chunks; inputs and outputs have the first axis BM."""
    xs = jax.tree.map(lambda x: x.reshape(grid.rows, -1, *x.shape[1:]), xs)
    chunks = jax.tree.leaves(xs)[0].shape[1]

    def at(n):
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, n, axis=1, keepdims=False), xs)

    def body(carry, n):
        carry, ys = carry
        carry, y = step(carry, at(n))
        return (carry, jax.tree.map(lambda ys, y: lax.dynamic_update_index_in_dim(ys, y, n, axis=1), ys, y)), None

    like = jax.eval_shape(lambda carry: step(carry, at(0))[1], carry)
    ys = jax.tree.map(lambda y: jnp.zeros((grid.rows, chunks, *y.shape[1:]), y.dtype), like)
    (carry, ys), _ = lax.scan(body, (carry, ys), jnp.arange(chunks), reverse=reverse)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), ys)


def _pick(states, segment):
    """Returns states[b, segment[b]] for every row b; segment None: there is only one state."""
    if segment is None:
        return states
    return jax.vmap(lambda row, n: lax.dynamic_index_in_dim(row, n, keepdims=False))(states, segment)


def _place(states, segment, state):
    if segment is None:
        return state
    return jax.vmap(lambda row, n, new: lax.dynamic_update_index_in_dim(row, new, n, 0))(states, segment, state)


def _map(f, stream: Stream, *more):
    """Applies f, which takes the `DeltaTokens` of one chunk of one head, over the axes (BM or B, H, R)."""

    def one(q, k, v, beta, decay, *more):
        if decay is not None and decay.hi.ndim == 1:
            column, row = (Decay(*(jnp.expand_dims(x, axis) for x in decay)) for axis in (1, 0))
            decay = ScalarDecay(column, row)
        return f(DeltaTokens(q, k, v, beta[:, None], decay), *more)

    mapped = jax.vmap(one, in_axes=(None, None, *[0] * (3 + len(more))))  # value heads share q and k
    for _ in range(stream.q.ndim - 2):
        mapped = jax.vmap(mapped)
    return mapped(*stream, *more)


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def _grid(plan: LogDecayPlan, group: int, inputs: DeltaInputs) -> GroupGrid:
    """Returns groups of about `group` chunks over all rows and heads, of a size that divides evenly if one exists."""
    batch, length, heads, _ = inputs.v.shape
    chunks, most = length // plan.chunk, max(1, group // (batch * heads))
    whole = [n for n in range(most // 2 + 1, most + 1) if chunks % n == 0]
    groups = chunks // whole[-1] if whole else -(-chunks // most)
    by_channel = inputs.decay is not None and inputs.decay.hi.ndim == 4
    mapped, copies = (heads, heads // inputs.q.shape[2]) if by_channel else (inputs.q.shape[2], 1)
    return GroupGrid(groups, plan.chunk, batch, mapped, copies)


def _padded(grid: GroupGrid, inputs: DeltaInputs) -> DeltaInputs:
    """Returns the inputs padded to whole groups; added chunks neither write nor decay.

    The layout keeps only the segments of the chunks.
    """
    tokens = jax.tree.map(partial(_pad_tokens, grid), inputs[:5])
    layout = inputs.layout
    if layout is not None:
        missing = -layout.segment.shape[1] % grid.groups
        layout = jnp.pad(layout.segment, ((0, 0), (0, missing)), mode="edge")
    return DeltaInputs(*tokens, inputs.state, layout)


def _pad_tokens(grid, x):
    missing = -x.shape[1] % (grid.groups * grid.chunk)
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _segments(grid: GroupGrid, n, tokens: DeltaInputs) -> Segments:
    """Returns the segment of every chunk of group n."""
    if tokens.layout is None:
        return None
    return _slice(grid, n, tokens.layout).reshape(-1)


def _split(grid, x, *heads):
    """`[B, M C, heads, ...]` to `[BM, *heads, C, ...]`."""
    x = x.reshape(-1, grid.chunk, *heads, *x.shape[3:])
    return jnp.moveaxis(x, 1, 1 + len(heads))


def _slice(grid, n, x):
    if grid.groups == 1:
        return x
    size = x.shape[1] // grid.groups
    return _apart(lax.dynamic_slice_in_dim(x, n * size, size, axis=1))


def _apart(x):
    """Returns x, not fused with later operations.

    Otherwise XLA repeats the slice in every fusion that reads it, with one index per element in its CPU code, which
    takes a fifth of the time.
    """
    return lax.optimization_barrier(x)


def _take(grid: GroupGrid, n, x):
    """Returns group n's part of a per-value-head array, `[BM, H, R, C, ...]`."""
    return _split(grid, _slice(grid, n, x), grid.heads, x.shape[2] // grid.heads)


def _stream(grid: GroupGrid, n, tokens: DeltaInputs) -> Stream:
    q, k = (_split(grid, _slice(grid, n, x), x.shape[2]) for x in tokens[:2])
    if grid.copies > 1:
        q, k = (jnp.repeat(x, grid.copies, axis=1) for x in (q, k))
    return Stream(q, k, *jax.tree.map(partial(_take, grid, n), tokens[2:5]))


def _of_group(grid: GroupGrid, n, tokens: DeltaInputs) -> tuple[Stream, Segments]:
    return _stream(grid, n, tokens), _segments(grid, n, tokens)


def _put(grid: GroupGrid, n, whole, part):
    """Writes group n's `[BM, heads, C, ...]` to its place among the tokens, in their dtype."""
    heads = part.ndim - whole.ndim + 1
    part = jnp.moveaxis(part, 1 + heads, 1)
    part = part.reshape(whole.shape[0], -1, *whole.shape[2:])
    if grid.groups > 1:
        part = _apart(part)
    return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), n * part.shape[1], axis=1)


def _split_heads(grid: GroupGrid, state):
    """Splits the states' value heads by query head."""
    return state.reshape(*state.shape[:-3], grid.heads, -1, *state.shape[-2:])
