"""Linear attention for any device: groups of chunks in sequence; within a group, only the state is sequential.

A group is small enough for a CPU's cache, or large enough to fill a GPU. Temporary memory is that of one group, and the
backward pass adds one state per group.

Axes here: M chunks, B rows, C tokens of a chunk, K and V features, N segments. The head axes, H below, are those of
`_heads`: two if value heads share the scores of their query head, else one.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayOutputs, LogDecayPlan
from engrax.pallas_kernels.common.matmul import Operands, accumulator, emulated_on_cpu
from engrax.pallas_kernels.linear_attention.chunk import ScalarDecay, read, write
from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
from engrax.pallas_kernels.passes import Passes

GROUP_CPU, GROUP = 32, 2048  # chunks times rows times value heads of a group
UNROLL = 8  # chunks per step of the scan over states: a step is only a few elementwise operations


class LinearForm(NamedTuple):
    """Static settings. group: chunks times rows times value heads; operands: of the matrix products."""

    chunk: int
    scale: float
    group: int
    operands: Operands


State = Float[Array, "B *NH K V"]
States = Float[Array, "M B *H K V"]


def forward(plan: LogDecayPlan, inputs: LinearInputs) -> tuple[LogDecayOutputs, tuple]:
    """Returns (out, final state) and no residuals."""
    return _by_device(_forward, plan, inputs), ()


def backward(plan: LogDecayPlan, inputs: LinearInputs, residuals: tuple, cotangents: LogDecayOutputs) -> LinearInputs:
    """Returns the cotangents of the inputs; the decay's is with respect to the cumulative sum."""
    return _by_device(_backward, plan, inputs, cotangents)


passes = Passes(forward, backward)


def _by_device(f, plan, inputs, *args):
    cpu = LinearForm(plan.chunk, plan.scale, GROUP_CPU, emulated_on_cpu(inputs.q.dtype))
    other = LinearForm(plan.chunk, plan.scale, GROUP, inputs.q.dtype)
    return lax.platform_dependent(inputs, *args, cpu=partial(f, cpu), default=partial(f, other))


# The walk over groups


def _forward(form, inputs):
    length = inputs.q.shape[1]
    groups, inputs = _groups(form, inputs)
    if groups == 1:
        return _group_forward(form, inputs)

    def step(carry, n):
        state, out = carry
        part_out, state = _group_forward(form, _part(groups, n, inputs._replace(state=None))._replace(state=state))
        return (state, _put(groups, n, out, part_out)), None

    (state, out), _ = lax.scan(step, (inputs.state, jnp.zeros_like(inputs.v)), jnp.arange(groups))
    return out[:, :length], state


def _backward(form, inputs, cotangents):
    length = inputs.q.shape[1]
    groups, inputs = _groups(form, inputs)
    out_bar, state_bar = cotangents
    out_bar = _pad_tokens(out_bar, inputs.v.shape[1])
    state_bar = state_bar.astype(inputs.state.dtype)
    tokens = inputs._replace(state=None)

    def advance(state, n):
        return _group_state(form, _part(groups, n, tokens)._replace(state=state)), state

    def step(carry, inputs_n):
        state_bar, bars = carry
        n, state = inputs_n
        part = _part(groups, n, tokens)._replace(state=state)
        part_bars = _group_backward(form, part, _part(groups, n, out_bar), state_bar)
        bars = jax.tree.map(partial(_put, groups, n), bars, part_bars._replace(state=None))
        return (part_bars.state, bars), None

    if groups == 1:
        bars = _group_backward(form, inputs, out_bar, state_bar)
    else:
        _, starts = lax.scan(advance, inputs.state, jnp.arange(groups))
        bars = jax.tree.map(jnp.zeros_like, tokens._replace(layout=None))
        (state_bar, bars), _ = lax.scan(step, (state_bar, bars), (jnp.arange(groups), starts), reverse=True)
        bars = bars._replace(state=state_bar)
    cut = jax.tree.map(lambda x: x[:, :length], bars._replace(state=None))
    return cut._replace(state=bars.state)


def _groups(form, inputs):
    """Returns the number of groups, and the inputs padded to whole groups."""
    chunks, lanes = inputs.q.shape[1] // form.chunk, inputs.v.shape[0] * inputs.v.shape[2]
    most = max(1, form.group // lanes)
    whole = [n for n in range(most // 2 + 1, most + 1) if chunks % n == 0]
    groups = chunks // whole[-1] if whole else -(-chunks // most)
    chunks = groups * -(-chunks // groups)
    layout = inputs.layout
    if layout is not None:
        segment = jnp.pad(layout.segment, ((0, 0), (0, chunks - layout.segment.shape[1])), mode="edge")
        layout = layout._replace(**dict.fromkeys(layout._fields) | {"segment": segment})  # only this is used here
    tokens = inputs._replace(state=None, layout=None)
    tokens = jax.tree.map(lambda x: _pad_tokens(x, chunks * form.chunk), tokens)
    return groups, tokens._replace(state=inputs.state, layout=layout)


def _pad_tokens(x, length):
    missing = length - x.shape[1]
    return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x


def _part(groups, n, tree):
    """Returns group n of arrays whose second axis is tokens or chunks."""

    def part(x):
        size = x.shape[1] // groups
        return lax.dynamic_slice_in_dim(x, n * size, size, axis=1)

    return jax.tree.map(part, tree)


def _put(groups, n, whole, part):
    return lax.dynamic_update_slice_in_dim(whole, part, n * (whole.shape[1] // groups), axis=1)


# One group


def _group_forward(form, inputs):
    q, k, v, decay = _to_chunks(form, inputs)
    keep, update = _over_heads(_write, form, inputs)(k, v, decay)
    before, final = _carry(keep, update, _split_heads(inputs, inputs.state), _segments(inputs))
    out = _over_heads(_read, form, inputs)(q, k, v, decay, before)
    return _to_tokens(out, _heads(inputs), inputs.v), final.reshape(inputs.state.shape)


def _group_state(form, inputs):
    """Returns the state after the group."""
    _, k, v, decay = _to_chunks(form, inputs)
    keep, update = _over_heads(_write, form, inputs)(k, v, decay)
    _, final = _carry(keep, update, _split_heads(inputs, inputs.state), _segments(inputs))
    return final.reshape(inputs.state.shape)


def _group_backward(form, inputs, out_bar, final_bar):
    heads = _heads(inputs)
    q, k, v, decay = _to_chunks(form, inputs)
    (keep, update), pull_write = jax.vjp(_over_heads(_write, form, inputs), k, v, decay)
    before, _ = _carry(keep, update, _split_heads(inputs, inputs.state), _segments(inputs))
    _, pull_read = jax.vjp(_over_heads(_read, form, inputs), q, k, v, decay, before)
    q_bar, k_bar, v_bar, decay_bar, read_bar = pull_read(_chunks(form, heads, out_bar))
    after_bar, state_bar = _carry_bwd(keep, read_bar, _split_heads(inputs, final_bar), _segments(inputs))
    keep_bar = None if keep is None else _sum_to(after_bar * before, keep.shape)
    k_more, v_more, decay_more = pull_write((keep_bar, after_bar))
    q_bar, k_bar = (_to_tokens(bar, heads[:1], inputs.q) for bar in (q_bar, k_bar + k_more))
    v_bar = _to_tokens(v_bar + v_more, heads, inputs.v)
    if decay is not None:
        lo_bar = _to_tokens(decay_bar.lo + decay_more.lo, heads, inputs.decay.lo)
        decay_bar = Decay(jnp.zeros_like(lo_bar), lo_bar)
    return LinearInputs(q_bar, k_bar, v_bar, decay_bar, state_bar.reshape(inputs.state.shape), None)


def _carry(keep, update: States, state: State, segments: Int[Array, "M B"] | None) -> tuple[States, State]:
    """Returns the states before every chunk, and the final state.

    segments: the segment of every chunk, whose state (one of N) it continues; None: there is only one state.
    """

    def step(state, chunk):
        keep, update, segment = chunk
        before = state if segment is None else _pick(state, segment)
        after = update + (before if keep is None else keep * before)
        return after if segment is None else _place(state, segment, after), before

    final, before = lax.scan(step, state, (keep, update, segments), unroll=UNROLL)
    return before, final


def _carry_bwd(keep, read_bar: States, state_bar: State, segments: Int[Array, "M B"] | None) -> tuple[States, State]:
    """Returns the cotangents of the states after every chunk, and of the initial state.

    read_bar: cotangents of the state before each chunk from the chunk's outputs. state_bar: that of the final state.
    """

    def step(state_bar, chunk):
        keep, read_bar, segment = chunk
        after_bar = state_bar if segment is None else _pick(state_bar, segment)
        before_bar = read_bar + (after_bar if keep is None else keep * after_bar)
        return before_bar if segment is None else _place(state_bar, segment, before_bar), after_bar

    state_bar, after_bar = lax.scan(step, state_bar, (keep, read_bar, segments), reverse=True, unroll=UNROLL)
    return after_bar, state_bar


def _pick(states, segment):
    """Returns states[b, segment[b]] for every row b."""
    return jax.vmap(lambda row, n: lax.dynamic_index_in_dim(row, n, keepdims=False))(states, segment)


def _place(states, segment, state):
    return jax.vmap(lambda row, n, new: lax.dynamic_update_index_in_dim(row, new, n, 0))(states, segment, state)


# One chunk of one head, mapped over all


def _read(form, q, k, v, decay, state):
    return read(q, k, v, _columns_and_rows(decay), state, scale=form.scale, dtype=form.operands)


def _write(form, k, v, decay):
    return write(k, v, _columns_and_rows(decay), dtype=form.operands)


def _columns_and_rows(decay: Decay | None):
    if decay is None or decay.hi.ndim == 2:
        return decay
    return ScalarDecay(Decay(decay.hi[:, None], decay.lo[:, None]), Decay(decay.hi[None], decay.lo[None]))


def _over_heads(f, form: LinearForm, inputs: LinearInputs):
    """Returns f, a function of one chunk of one head, mapped over chunks, rows and heads."""
    f, heads = partial(f, form), len(_heads(inputs))

    def run(*args):
        mapped = f
        if heads == 2:  # q and k lack the axis of the value heads that share them
            mapped = jax.vmap(mapped, tuple(None if isinstance(x, jax.Array) and x.ndim == 5 else 0 for x in args))
        return jax.vmap(jax.vmap(jax.vmap(mapped)))(*args)

    return run


# Layouts


def _heads(inputs: LinearInputs) -> tuple[int, ...]:
    """Returns the sizes of the head axes: (H, R) if the R value heads of a query head share its scores, else (HV,).

    Under one gate per channel, each value head has its own scores.
    """
    heads, value_heads = inputs.q.shape[2], inputs.v.shape[2]
    shares = value_heads > heads and (inputs.decay is None or inputs.decay.hi.ndim == 3)
    return (heads, value_heads // heads) if shares else (value_heads,)


def _to_chunks(form: LinearForm, inputs: LinearInputs):
    """Returns q, k, v and decay `[M, B, H, C, ...]`, in the accumulator's dtype."""
    heads = _heads(inputs)
    own = heads[0] // inputs.q.shape[2]  # 1, or how many times a query head is repeated
    q, k = (_chunks(form, (heads[0],), jnp.repeat(x, own, axis=2) if own > 1 else x) for x in inputs[:2])
    v, decay = jax.tree.map(partial(_chunks, form, heads), (inputs.v, inputs.decay))
    return q, k, v, decay


def _chunks(form, heads, x):
    x = x.reshape(x.shape[0], -1, form.chunk, *heads, *x.shape[3:])
    x = jnp.moveaxis(x.astype(accumulator(x.dtype)), 2, 2 + len(heads))
    return jnp.moveaxis(x, 1, 0)


def _to_tokens(x, heads, like):
    """Converts chunks back to tokens with the shape and dtype of `like`, summed over heads that share its tokens."""
    x = jnp.moveaxis(jnp.moveaxis(x, 0, 1), 2 + len(heads), 2)
    if like.ndim == 4 and heads[0] > like.shape[2]:
        x = jnp.sum(x.reshape(*x.shape[:3], like.shape[2], -1, x.shape[-1]), axis=4)
    return x.reshape(like.shape).astype(like.dtype)


def _split_heads(inputs, state):
    """Splits the head axis of states into the head axes."""
    return state.reshape(*state.shape[:-3], *_heads(inputs), *state.shape[-2:])


def _segments(inputs):
    return None if inputs.layout is None else inputs.layout.segment.T


def _sum_to(x, shape):
    """Sums over the axes along which an array of `shape` was broadcast to x."""
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return jnp.sum(x, axis=axes, keepdims=True)
