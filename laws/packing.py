"""Law 5: documents packed into one row do not influence each other."""

import functools

import numpy as np

from engrax.laws.breach import close, demand, law, output_position
from engrax.laws.causality import gradient_of_other_tokens, jacobian, no_gradient, some_tokens, zero_jacobian
from engrax.laws.gates import each_leaf_pushed, pushed_inputs
from engrax.laws.layouts import trailing_padding
from engrax.laws.subject import Subject


def _ranks(ids: np.ndarray) -> np.ndarray:
    """For every position, the index of its segment in the row; -1 at padding."""
    ranks = np.stack([np.searchsorted(np.unique(row[row >= 0]), row) for row in ids])
    return np.where(ids >= 0, ranks, -1)


@law("packing.apart")
def packed_segments_equal_segments_alone(s: Subject, deep: bool = False):
    """A segment's outputs do not depend on the other segments. A segment that begins on the chunk grid gives the same
    as alone in a row. Later calls give the same too."""
    ids = np.asarray(s.ids)
    ranks = _ranks(ids)
    packed, state = s.run(s.params, s.x, None, s.ids)
    packed = s.shown(packed, ids)
    for rank in range(ranks.max() + 1):
        own = ranks == rank
        among_others, after = s.run(s.params, s.changed(s.x, ~own), None, s.ids)
        what = f"segment {rank} of each row after a change of the other segments"
        close(
            np.where(own[..., None], s.shown(among_others, ids), 0),
            np.where(own[..., None], packed, 0),
            what,
            s.rounding,
        )
        last = np.flatnonzero(ranks.max(axis=1) == rank)
        _follows(s, state, after, ids, last, what)
    _, changed = s.run(s.params, s.changed(s.x, ids >= 0), None, s.ids)
    _next_document(s, s.params, s.x, state, changed, "")
    _equals_a_row_of_its_own(s, packed)


def _follows(s: Subject, state, changed, ids, rows, what: str) -> None:
    """Two tokens that continue the last segment of the rows, from two states."""
    if not len(rows):
        return
    last = ids.max(axis=1, keepdims=True).astype(np.int32)
    for t in range(2):
        y, state = s.run(s.params, s.x[:, t : t + 1], state, last)
        y_changed, changed = s.run(s.params, s.x[:, t : t + 1], changed, last)
        place = functools.partial(_place_after, s.length + t, rows)
        close(np.asarray(y_changed)[rows], np.asarray(y)[rows], f"what follows {what}", s.rounding, place)


def _place_after(first_token: int, rows, index: tuple[int, ...]) -> str:
    return output_position((int(rows[index[0]]), *index[1:]), first_token)


def _next_document(s: Subject, params, x, state, changed, what: str) -> None:
    """The first token of another document in the next call, from two states that differ by this call's content."""
    fresh = np.asarray(s.ids).max(axis=1, keepdims=True).astype(np.int32) + 1
    y, z = (np.asarray(s.run(params, x[:, :1], given, fresh)[0]) for given in (state, changed))
    if np.all(np.isfinite(y)):
        place = functools.partial(_place_after, s.length, range(len(y)))
        close(z, y, f"{what}a new document in the next call after a change of this call's", s.rounding, place)


def _equals_a_row_of_its_own(s: Subject, packed: np.ndarray) -> None:
    """Row 0's first segment, and row 2's second, which begins on the chunk grid, against runs from the row's start."""
    start, first = 2 * s.chunk, s.chunk + 3
    ids = trailing_padding(s.one_segment, [first, s.length, s.length])
    alone = s.shown(s.run(s.params, s.x, None, ids)[0], ids)
    close(alone[:1, :first], packed[:1, :first], "the first segment of a row against a row of its own", s.rounding)
    ids = trailing_padding(s.one_segment, [s.length, s.length, s.length - start])
    alone = s.shown(s.run(s.params, np.roll(s.x, -start, axis=1), None, ids)[0], ids)
    what = "a segment on the chunk grid against a row of its own"
    close(alone[2:, :-start], packed[2:, start:], what, s.rounding)


@law("packing.slow_decay")
def nothing_leaks_where_gates_keep_everything(s: Subject, deep: bool = False):
    """Each parameter in turn is pushed so that a gate may keep everything. Then the first segment of every row is
    changed, and its last. No other segment may change, nor the first token of another document in the next call."""
    ids = np.asarray(s.ids)
    ranks = _ranks(ids)
    last = ranks.max(axis=1, keepdims=True)
    others = (ranks > 0) & (ranks < np.where(last == 1, 2, last))  # a row of two segments: its second is read
    x = pushed_inputs(s, s.x)
    changed = s.changed(x, (ranks == 0) | ((ranks == last) & (last > 1)))
    for what, params in each_leaf_pushed(s):
        (y, state), (z, state_changed) = (s.run(params, inputs, None, s.ids) for inputs in (x, changed))
        y, z = (np.where(others[..., None], np.asarray(outputs), 0) for outputs in (y, z))
        if not (np.all(np.isfinite(y)) and np.max(np.abs(y)) < 1e6):  # the memory diverges: no verdict is possible
            continue
        close(z, y, f"with {what}, other segments after a change of the first", s.rounding)
        _next_document(s, params, x, state, state_changed, f"with {what}, ")


@law("packing.gradients")
def gradients_do_not_cross_segments(s: Subject, deep: bool = False):
    """The Jacobian of outputs by inputs of other segments is exactly zero."""
    ids = np.asarray(s.ids)
    if s.is_model:
        others = np.isin(ids, [0, 3, 6])  # some segments of each row against the rest
        no_gradient(gradient_of_other_tokens(s, s.ids, others), "gradient of another segment's tokens")
        return
    tokens = some_tokens(s, deep)
    size = jacobian(s, True, tokens)
    crosses = ids.T[np.asarray(tokens)][:, :, None] != ids[None]
    zero_jacobian(np.where(crosses, size, 0), tokens, "the output depends on another segment")
    demand(np.any(size > 0), "the outputs do not depend on the inputs")
