"""Law 9 for mixers: padding (-1) after a row's last token of a call is nothing.

Rows are run through two calls padded by different amounts, and then continued token by token. The same tokens without
padding must give the same outputs, the same state in every leaf after each call, and the same outputs afterwards.
Filler (-2) between documents stays: it counts in the chunk grid. Outputs at padding and filler are exactly 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from engrax.tests.laws import close, same
from engrax.tests.subjects import Subject

PADDING, FILLER = -1, -2


class Calls(NamedTuple):
    """Two calls of one shape and the tokens that follow. Inputs [R, T, D], segment ids [R, T]."""

    x: tuple[np.ndarray, ...]
    ids: tuple[np.ndarray, ...]
    more: np.ndarray  # [R, M, D], of every row's last segment


def calls_of(s: Subject) -> Calls:
    """Rows that end on and off the chunk grid, one of them all padding in the first call and another in the second."""
    c = s.chunk
    first = (
        [(0, c + 1)],
        [(0, c - 2), (FILLER, 2), (4, 2 * c), (FILLER, 1)],
        [],
    )
    second = (
        [(0, c - 1)],  # together two whole chunks
        [],
        [(5, 2 * c), (7, c + 7)],  # no padding
    )
    ids = [np.full((len(rows), s.length), PADDING, np.int32) for rows in (first, second)]
    for rows, array in zip((first, second), ids):
        for row, pieces in enumerate(rows):
            flat = np.concatenate([np.full(n, i) for i, n in pieces]) if pieces else np.zeros(0)
            array[row, : len(flat)] = flat
    rng = np.random.default_rng(3)
    x = [rng.standard_normal((*array.shape, s.dim)) for array in ids]
    x = [np.where((array < 0)[..., None], 5.0 + 3.0 * values, values) for array, values in zip(ids, x)]
    follow = rng.standard_normal((len(first), c + 3, s.dim))
    return Calls(tuple(x), tuple(ids), follow)


class Ran(NamedTuple):
    """What a run gave: outputs of the two calls, the states after them, and the outputs of what follows."""

    outputs: list
    states: list
    after: np.ndarray
    last: object  # the state at the end


def last_ids(calls: Calls) -> np.ndarray:
    """The id of every row's last segment."""
    return np.max(np.concatenate(calls.ids, axis=1), axis=1, keepdims=True)


def padded(s: Subject, calls: Calls) -> Ran:
    """The calls as they are."""
    state, outputs, states = None, [], []
    for x, ids in zip(calls.x, calls.ids):
        y, state = s.run(s.params, x, state, ids)
        outputs.append(np.asarray(y))
        states.append(state)
    after = []
    for t in range(calls.more.shape[1]):
        y, state = s.run(s.params, calls.more[:, t : t + 1], state, last_ids(calls))
        after.append(np.asarray(y))
    return Ran(outputs, states, np.concatenate(after, axis=1), state)


def by_steps(s: Subject, calls: Calls) -> Ran:
    """The same without padding, every row token by token (all rows at once, each at its own pace)."""
    rows, more = len(calls.more), calls.more.shape[1]
    keep = [ids != PADDING for ids in calls.ids]
    counts = np.stack([k.sum(axis=1) for k in keep])  # [2, R]
    ends = np.cumsum(counts, axis=0)
    length = ends[-1].max() + more
    x = np.zeros((rows, length, calls.more.shape[-1]))
    ids = np.broadcast_to(last_ids(calls), (rows, length)).astype(np.int32).copy()
    for r in range(rows):
        tokens = np.concatenate([*(a[r][k[r]] for a, k in zip(calls.x, keep)), calls.more[r]])
        x[r, : len(tokens)] = tokens
        ids[r, : ends[-1][r]] = np.concatenate([a[r][k[r]] for a, k in zip(calls.ids, keep)])
    state, states, y = s.start(s.params, rows), [], []
    states.append(state)
    for t in range(length):
        out, state = s.run(s.params, x[:, t : t + 1], state, ids[:, t : t + 1])
        y.append(np.asarray(out))
        states.append(state)
    y = np.concatenate(y, axis=1)

    def rows_at(places):
        return s.join_rows([s.take_rows(states[t], [r]) for r, t in enumerate(places)])

    outputs = []
    for k, begin in zip(keep, (0 * ends[0], ends[0])):
        out = np.zeros((*k.shape, y.shape[-1]))
        for r in range(rows):
            out[r, k[r]] = y[r, begin[r] : begin[r] + k[r].sum()]
        outputs.append(out)
    after = np.stack([y[r, ends[-1][r] : ends[-1][r] + more] for r in range(rows)])
    return Ran(outputs, [rows_at(e) for e in ends], after, rows_at(ends[-1] + more))


def by_rows(s: Subject, calls: Calls) -> Ran:
    """The same without padding, every row by itself and cut as it is; a call without tokens is left out."""
    found = []
    for r in range(len(calls.more)):
        state, outputs, states = None, [], []
        for x, ids in zip(calls.x, calls.ids):
            k = ids[r] != PADDING
            out = np.zeros((1, len(k), x.shape[-1]))
            if k.any():
                y, state = s.run(s.params, x[r : r + 1, k], state, ids[r : r + 1, k])
                out = np.zeros((1, len(k), y.shape[-1]))
                out[:, k] = y
            outputs.append(out)
            states.append(s.start(s.params, 1) if state is None else state)
        after, state = [], states[-1]
        for t in range(calls.more.shape[1]):
            y, state = s.run(s.params, calls.more[r : r + 1, t : t + 1], state, last_ids(calls)[r : r + 1])
            after.append(np.asarray(y))
        found.append(Ran(outputs, states, np.concatenate(after, axis=1), state))
    outputs = [np.concatenate(parts) for parts in zip(*(f.outputs for f in found))]
    states = [s.join_rows(list(parts)) for parts in zip(*(f.states for f in found))]
    return Ran(outputs, states, np.concatenate([f.after for f in found]), s.join_rows([f.last for f in found]))


def compare_states(actual, wanted, what: str):
    """Every leaf, to rounding; integers exactly."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(actual))
    for (path, want), got in leaves:
        check = close if np.issubdtype(np.asarray(want).dtype, np.floating) else same
        check(got, want, f"{what}, {jax.tree_util.keystr(path)}")


def padding(s: Subject, deep: bool = False):
    """Padding after a row's last token of a call changes nothing but rounding."""
    calls = calls_of(s)
    got = padded(s, calls)
    stepwise = not any(name in s.config.exempt_from for name in ("paths", "paths.steps"))
    ways = {"token by token": by_steps} if stepwise else {}
    if deep or not stepwise:
        ways["row by row"] = by_rows
    for call, (y, ids) in enumerate(zip(got.outputs, calls.ids)):
        same(y[ids < 0], 0 * y[ids < 0], f"outputs of call {call + 1} at padding")
    for way, run in ways.items():
        wanted = run(s, calls)
        for call, (y, want) in enumerate(zip(got.outputs, wanted.outputs)):
            close(y, want, f"outputs of call {call + 1} with padding against {way} without")
        close(got.after, wanted.after, f"outputs of what follows padding against {way} without")
        for call, (state, want) in enumerate(zip(got.states, wanted.states)):
            compare_states(state, want, f"the state after call {call + 1} with padding against {way} without")
        compare_states(got.last, wanted.last, f"the state at the end against {way} without padding")
    if deep:
        gradients_are_finite(s, calls)


def gradients_are_finite(s: Subject, calls: Calls):
    """Through both calls and the state between them; padding gets none."""

    def total(params, x):
        state, found = None, 0.0
        for one, ids in zip(x, calls.ids):
            y, state = s.apply(params, one, state, jnp.asarray(ids))
            found += jnp.sum(y * y)
        return found

    params, inputs = jax.jit(jax.grad(total, argnums=(0, 1)))(s.params, calls.x)
    for path, g in jax.tree_util.tree_leaves_with_path(params):
        assert np.all(np.isfinite(g)), f"the gradient of {jax.tree_util.keystr(path)} is not finite"
    for g, ids in zip(inputs, calls.ids):
        assert np.all(np.isfinite(g)), "the gradient of the inputs is not finite"
        same(np.asarray(g)[ids < 0], 0 * np.asarray(g)[ids < 0], "the gradient of padding")
