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
    """Other rows are changed, permuted and zeroed: outputs and state of row 0 stay as they are, bit for bit."""
    others = np.broadcast_to((np.arange(ROWS) > 0)[:, None], (ROWS, s.length))
    swap = np.array([0, 2, 1])
    for ids in s.layouts(deep):
        before = s.run(s.params, s.x, None, ids)
        for what, x, ids_then in (
            ("changed", s.changed(s.x, others), ids),
            ("permuted", s.x[swap], None if ids is None else ids[swap]),
            ("zero", np.where(others.reshape(others.shape + (1,) * (s.x.ndim - 2)), 0, s.x).astype(s.x.dtype), ids),
        ):
            after = s.run(s.params, x, None, ids_then)
            y_after, y_before = (s.shown(y, i) for (y, _), i in ((after, ids_then), (before, ids)))
            same(y_after[:1], y_before[:1], f"outputs of row 0 with the other rows {what}")
            states = [s.take_rows(state, [0]) for _, state in (after, before)]
            leaves = zip(jax.tree_util.tree_leaves_with_path(states[0]), jax.tree.leaves(states[1]))
            for (path, leaf_after), leaf_before in leaves:
                place = functools.partial(leaf_position, path)
                same(leaf_after, leaf_before, f"state of row 0 with the other rows {what}", place)
            if what == "permuted":
                close(y_after[swap], y_before, "outputs of permuted rows", s.rounding)


@law("independence.batch_size")
def batch_size_changes_rounding_only(s: Subject, deep: bool = False):
    """A row alone gives what it gives in a batch."""
    place = functools.partial(_place_of_row, 2)
    wanted, _ = s.run(s.params, s.x)
    alone, _ = s.run(s.params, s.x[2:])
    close(alone, wanted[2:], "a row alone against the same row in a batch", s.rounding, place)
    if deep:
        place, ids = functools.partial(_place_of_row, 1), s.ids[1:2]
        alone, whole = s.run(s.params, s.x[1:2], None, ids)[0], s.run(s.params, s.x, None, s.ids)[0]
        what = "a packed row alone against the same row in a batch"
        close(s.shown(alone, ids), s.shown(whole[1:2], ids), what, s.rounding, place)


def _place_of_row(row: int, index: tuple[int, ...]) -> str:
    return output_position((row, *index[1:]))


@law("independence.gradients")
def gradients_do_not_cross_rows(s: Subject, deep: bool = False):
    """The outputs of row 0 have no gradient by the inputs of other rows."""
    others = np.broadcast_to((np.arange(ROWS) > 0)[:, None], (ROWS, s.length))
    what = "gradient of row 0's outputs by other rows"
    if s.is_model:
        no_gradient(gradient_of_other_tokens(s, s.ids, others), what)
        return
    grads = s.pullback(s.params, s.x, s.ids, np.where(others[..., None], 0, s.weights))[1]
    same(np.asarray(grads)[1:], 0, what, lambda index: output_position((index[0] + 1, *index[1:])))
