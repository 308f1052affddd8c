"""Law 4: rows of a batch do not influence each other."""

import functools

import jax
import numpy as np

from engrax.laws.breach import close, law, leaf_position, output_position, same
from engrax.laws.causality import gradient_of_other_tokens, no_gradient
from engrax.laws.layouts import ROWS
from engrax.laws.subject import Subject


@law("independence.rows")
def other_rows_change_no_bit(s: Subject, deep: bool = False):
    """A row is changed or set to zero, or others are permuted: outputs and state of the rest keep every bit."""
    swap = np.array([0, 2, 1])
    for ids in s.layouts(deep):
        before = s.run(s.params, s.x, None, ids)
        for row in range(ROWS):
            here = np.broadcast_to((np.arange(ROWS) == row)[:, None], (ROWS, s.length))
            zero = np.where(here.reshape(here.shape + (1,) * (s.x.ndim - 2)), 0, s.x).astype(s.x.dtype)
            rest = [r for r in range(ROWS) if r != row]
            for how, x in (("changed", s.changed(s.x, here)), ("zero", zero)):
                _keeps(s, rest, s.run(s.params, x, None, ids), before, ids, f"with row {row} {how}")
        ids_then = None if ids is None else ids[swap]
        after = s.run(s.params, s.x[swap], None, ids_then)
        _keeps(s, [0], after, before, ids, "with the other rows permuted")
        permuted = s.shown(after[0], ids_then)[swap]
        close(permuted, s.shown(before[0], ids), "outputs of permuted rows", s.rounding)


def _keeps(s: Subject, rows: list[int], after, before, ids, how: str) -> None:
    """Raises a Breach if outputs or states of `rows` differ in a bit."""
    place = functools.partial(_place_of_row, rows)
    y_after, y_before = (s.shown(y, ids)[rows] for y, _ in (after, before))
    same(y_after, y_before, f"outputs of other rows {how}", place)
    states = [s.take_rows(state, rows) for _, state in (after, before)]
    for (path, leaf_after), leaf_before in zip(
        *(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]))
    ):
        same(leaf_after, leaf_before, f"state of other rows {how}", functools.partial(_leaf_of_row, path, rows))


@law("independence.batch_size")
def batch_size_changes_rounding_only(s: Subject, deep: bool = False):
    """A row gives the same alone and in a batch."""
    place = functools.partial(_place_of_row, [2])
    wanted, _ = s.run(s.params, s.x)
    alone, _ = s.run(s.params, s.x[2:])
    close(alone, wanted[2:], "a row alone against the same row in a batch", s.rounding, place)
    if deep:
        place, ids = functools.partial(_place_of_row, [1]), s.ids[1:2]
        alone, whole = s.run(s.params, s.x[1:2], None, ids)[0], s.run(s.params, s.x, None, s.ids)[0]
        what = "a packed row alone against the same row in a batch"
        close(s.shown(alone, ids), s.shown(whole[1:2], ids), what, s.rounding, place)


def _place_of_row(rows: list[int], index: tuple[int, ...]) -> str:
    return output_position((rows[index[0]], *index[1:]))


def _leaf_of_row(path, rows: list[int], index: tuple[int, ...]) -> str:
    return f"state {leaf_position(path, index)} of rows {rows}"


@law("independence.gradients")
def gradients_do_not_cross_rows(s: Subject, deep: bool = False):
    """The outputs of a row have no gradient by the inputs of other rows."""
    for row in range(ROWS):
        others = np.broadcast_to((np.arange(ROWS) != row)[:, None], (ROWS, s.length))
        what = f"gradient of row {row}'s outputs by other rows"
        if s.is_model:
            no_gradient(gradient_of_other_tokens(s, s.ids, others), what)
            continue
        grads = s.pullback(s.params, s.x, s.ids, np.where(others[..., None], 0, s.weights))[1]
        rest = [r for r in range(ROWS) if r != row]
        same(np.asarray(grads)[rest], 0, what, functools.partial(_place_of_row, rest))
