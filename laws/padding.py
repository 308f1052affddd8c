"""Law 9: padding (-1) has no effect. A mixer gets it after a row's last token, a model anywhere."""

import functools

import jax
import numpy as np

from engrax.laws.breach import Breach, close, close_trees, law, output_position, same
from engrax.laws.layouts import ROWS, scattered_padding, trailing_padding
from engrax.laws.subject import Subject


@law("padding.content")
def what_stands_in_padding_changes_no_bit(s: Subject, deep: bool = False):
    """The content of padding changes no bit of the outputs or of later calls; outputs at padding are finite."""
    ids = s.ids if s.is_model else trailing_padding(s.ids, [s.chunk + 5, s.length, 2 * s.chunk - 1])
    padding = np.asarray(ids) < 0
    before = s.run(s.params, s.x, None, ids)
    after = s.run(s.params, s.changed(s.x, padding), None, ids)
    broken = np.argwhere(~np.isfinite(np.asarray(before[0])))
    if len(broken):
        raise Breach(
            "the output is not finite in a row with padding", position=output_position(tuple(map(int, broken[0])))
        )
    same(s.shown(after[0], ids), s.shown(before[0], ids), "outputs after a change of what stands in padding")
    (_, before), (_, after), last = before, after, np.asarray(ids).max(axis=1, keepdims=True)
    for t in range(4):  # the row's last segment continues
        y_before, before = s.run(s.params, s.x[:, t : t + 1], before, last)
        y_after, after = s.run(s.params, s.x[:, t : t + 1], after, last)
        place = functools.partial(output_position, first_token=s.length + t)
        same(y_after, y_before, "tokens that follow after a change of what stands in padding", place)


@law("padding.nothing")
def rows_with_padding_equal_rows_without(s: Subject, deep: bool = False):
    """Rows with and without padding agree to rounding: outputs at tokens, the whole state, later calls, gradients."""
    if s.is_model:
        _model_with_padding(s, s.one_segment, gradients=True)
        _model_with_padding(s, s.ids)  # documents and filler
        if s.thorough or deep:
            _, state = s.run(s.params, s.x[:, : s.chunk - 2], None, s.one_segment[:, : s.chunk - 2])
            _model_with_padding(s, s.one_segment, state)
        return
    lengths = [(s.chunk + 3,) * ROWS]
    if s.thorough or deep:
        lengths = [(s.chunk + 3, 1, s.length - 1), (s.chunk, 2 * s.chunk + 1, 2)]
    for tokens in lengths:
        _mixer_with_padding(s, tokens, None, s.one_segment)
    if s.thorough or deep:  # a call that continues, in packed rows, and rows of only padding
        a = s.chunk - 2
        _, state = s.run(s.params, s.x[:, :a], None, s.ids[:, :a])
        _mixer_with_padding(s, (5, 0, s.chunk), state, s.ids, a)
        _gradients_with_padding(s, s.chunk + 3)


def _mixer_with_padding(s: Subject, tokens: tuple[int, ...], state, ids, start: int = 0) -> None:
    """A call whose row b has tokens[b] tokens and then padding, against calls of only those tokens."""
    x, ids = np.roll(s.x, -start, axis=1), np.roll(ids, -start, axis=1)
    ids = np.maximum.accumulate(np.where(np.arange(s.length) < s.length - start, ids, -1), axis=1)
    padded = trailing_padding(ids, tokens)
    y, after = s.run(s.params, x, state, padded)
    for n in sorted(set(tokens)):
        rows = np.flatnonzero(np.asarray(tokens) == n)
        own = functools.partial(_own_row, rows, start)
        what = f"rows of {n} tokens and {s.length - n} of padding against rows without padding"
        if n == 0:
            if state is not None:
                found, wanted = (s.take_rows(tree, rows) for tree in (after, state))
                close_trees(found, wanted, "the state after a row of padding alone", s.rounding)
            continue
        alone, state_alone = s.run(s.params, x[:, :n], state, ids[:, :n])
        close(np.asarray(y)[rows, :n], np.asarray(alone)[rows], f"outputs of {what}", s.rounding, own)
        found, wanted = (s.take_rows(tree, rows) for tree in (after, state_alone))
        close_trees(found, wanted, f"the state after {what}", s.rounding)
        _follows(s, after, state_alone, padded.max(axis=1, keepdims=True), rows, what)


def _gradients_with_padding(s: Subject, n: int) -> None:
    """Gradients of the outputs at n tokens, with padding after them and without."""
    ids = trailing_padding(s.one_segment, [n] * ROWS)
    grads, grads_x = s.pullback(s.params, s.x, ids, np.where((ids >= 0)[..., None], s.weights, 0))
    wanted, wanted_x = s.pullback(s.params, s.x[:, :n], s.one_segment[:, :n], s.weights[:, :n])
    what = f"rows of {n} tokens and {s.length - n} of padding against rows without padding"
    close_trees(grads, wanted, f"gradients of {what}", s.gradient_rounding)
    close(np.asarray(grads_x)[:, :n], wanted_x, f"gradients by the inputs of {what}", s.gradient_rounding)
    same(np.asarray(grads_x)[:, n:], 0, f"gradients by padding of {what}")


def _own_row(rows, start: int, index: tuple[int, ...]) -> str:
    return output_position((int(rows[index[0]]), *index[1:]), start)


def _follows(s: Subject, padded, alone, last, rows, what: str) -> None:
    """Four tokens that continue each row's last segment."""
    last = np.maximum(last, 0).astype(np.int32)
    for t in range(4):
        token = s.x[:, t : t + 1]
        y, padded = s.run(s.params, token, padded, last)
        z, alone = s.run(s.params, token, alone, last)
        place = functools.partial(output_position, first_token=s.length + t)
        close(np.asarray(y)[rows], np.asarray(z)[rows], f"tokens that follow {what}", s.rounding, place)


def _model_with_padding(s: Subject, ids, state=None, *, gradients: bool = False) -> None:
    """Tokens and filler with padding before, inside and after them, against the same rows without padding."""
    n = s.length - s.chunk
    where, ids = scattered_padding(n, s.length), ids[:, :n]
    padded, x = np.full((ROWS, s.length), -1, np.int32), s.changed(s.x, np.ones((ROWS, s.length), bool))
    np.put_along_axis(padded, where, ids, axis=1)
    np.put_along_axis(x, where, s.x[:, :n], axis=1)
    y, after = s.run(s.params, x, state, padded)
    alone, state_alone = s.run(s.params, s.x[:, :n], state, ids)
    what = "rows with padding before, inside and after the tokens against rows without"
    found = np.take_along_axis(np.asarray(y), where[..., None], axis=1)
    close(s.shown(found, ids), s.shown(alone, ids), f"outputs of {what}", s.rounding)
    close_trees(after, state_alone, f"the memory after {what}", s.rounding)
    _follows(s, after, state_alone, ids.max(axis=1, keepdims=True), np.arange(ROWS), what)
    if not gradients:
        return
    weights = np.zeros_like(s.weights)
    np.put_along_axis(weights, where[..., None], s.weights[:, :n], axis=1)
    grads = s.pullback(s.params, x, padded, weights)
    wanted = s.pullback(s.params, s.x[:, :n], ids, s.weights[:, :n])
    close_trees(jax.tree.map(np.asarray, grads), wanted, f"gradients of {what}", s.gradient_rounding)
