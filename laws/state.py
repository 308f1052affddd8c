"""The contract of the state: leaves are [B, ...], sizes do not depend on T, `None` means the initial state."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from engrax.laws.breach import close, demand, law, leaf_position
from engrax.laws.layouts import ROWS
from engrax.laws.subject import Subject, in_bfloat16

LONG = 1025  # tokens of the longest call whose state is checked


@law("state.shapes")
def state_has_a_batch_axis_and_a_fixed_size(s: Subject, deep: bool = False):
    """Calls of any length keep the shapes and dtypes of the state, in float64 and in bfloat16."""
    start = s.start(s.params, ROWS)
    _has_batch_axes(s)
    for ids in s.layouts(deep):
        for length, given in ((1, start), (s.length, None)):
            _, after = s.run(s.params, s.x[:, :length], given, None if ids is None else ids[:, :length])
            _same_kinds(after, start, length)
    if not (s.thorough or deep):
        return
    long = s.with_capacity(LONG)
    start = long.start(s.params, ROWS)
    positions = getattr(getattr(s.config, "layout", None), "positions", 0)  # learned ones: no call may have more tokens
    for length in (1, 2, 3, s.chunk - 1, s.chunk, s.chunk + 1, s.length, min(LONG, positions or LONG)):
        x, ids = s.inputs(ROWS, length), np.zeros((ROWS, length), np.int32)
        for given, segments in ((None, None), (start, ids)):
            _, after = jax.eval_shape(long.apply, s.params, x, given, segments)
            _same_kinds(after, start, length)
    with jax.enable_x64(False):
        half = in_bfloat16(s.initial)
        x = s.x if s.is_model else jnp.zeros(s.x.shape, jnp.bfloat16)
        start = jax.eval_shape(lambda p: s.init_state(p, ROWS), half)
        _, after = jax.eval_shape(s.apply, half, x, start, s.one_segment)
        _same_kinds(after, start, s.length, "in bfloat16, ")


def _has_batch_axes(s: Subject):
    if s.is_model:
        return s.batch_axes
    for rows in (2, 5):
        start = jax.eval_shape(functools.partial(s.init_state, batch_size=rows), s.params)
        for path, leaf in jax.tree_util.tree_leaves_with_path(start):
            message = f"the leaf is {leaf.dtype}{list(leaf.shape)} for {rows} rows; every leaf must be [B, ...]"
            demand(leaf.shape[:1] == (rows,), message, position=f"state {leaf_position(path)}")


def _same_kinds(after, start, length: int, when: str = ""):
    """Raises a Breach for the first leaf whose shape or dtype a call has changed."""
    again = "; every call would be compiled again"
    trees = [jax.tree.structure(tree) for tree in (start, after)]
    demand(trees[0] == trees[1], f"{when}a call of {length} tokens turns the state {trees[0]} into {trees[1]}{again}")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(start), jax.tree.leaves(after)):
        kinds = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in (a, b)]
        message = f"{when}a call of {length} tokens turns {kinds[0]} into {kinds[1]}{again}"
        demand(kinds[0] == kinds[1], message, position=f"state {leaf_position(path)}")


@law("state.start")
def init_state_is_what_none_means(s: Subject, deep: bool = False):
    """Calls from init_state(B) and from None give the same."""
    length = s.length if deep else 1
    for ids in (None, s.ids[:, :length]) if deep else (None,):
        wanted, _ = s.run(s.params, s.x[:, :length], None, ids)
        actual, _ = s.run(s.params, s.x[:, :length], s.start(s.params, ROWS), ids)
        what = "outputs from init_state against outputs from None"
        close(s.shown(actual, ids), s.shown(wanted, ids), what, s.rounding)


@law("state.one_segment")
def no_ids_mean_one_segment(s: Subject, deep: bool = False):
    """Calls without segment ids and with one segment give the same."""
    actual, wanted = (s.run(s.params, s.x, None, ids) for ids in (None, s.one_segment))
    close(actual[0], wanted[0], "outputs without ids against outputs with one segment", s.rounding)
