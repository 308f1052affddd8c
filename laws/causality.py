"""Law 3: a finite change of a token changes no bit of earlier outputs; no gradient comes from the future."""

import functools

import jax
import numpy as np

from engrax.laws.breach import Breach, demand, law, output_position, same
from engrax.laws.layouts import ROWS
from engrax.laws.subject import Subject, values_of

REACH = 3 * 1024  # tokens of rows that show distant leaks; short rows end inside a chunk, these with a whole one


@law("causality.finite_change")
def the_future_changes_no_bit_of_the_past(s: Subject, deep: bool = False):
    """Every token in turn is replaced by another; outputs before it do not change in any bit."""
    for ids in s.layouts(deep):
        before, seen = s.shown(s.run(s.params, s.x, None, ids)[0], ids), False
        for t in range(1, s.length):
            here = np.broadcast_to(np.arange(s.length) == t, (ROWS, s.length))
            after = s.shown(s.run(s.params, s.changed(s.x, here), None, ids)[0], ids)
            same(after[:, :t], before[:, :t], f"outputs before token {t} after a change of token {t}")
            seen = seen or np.any(after[:, t:] != before[:, t:])
        demand(seen, "no output depends on any input: nothing can be said of causality")


@law("causality.distance")
def the_far_future_changes_no_bit_of_the_past(s: Subject, deep: bool = False):
    """On rows of 3072 tokens, which show distant leaks, all tokens from t on are replaced."""
    reach = min([REACH, *(n for n in values_of(s.config, "positions") if n)])  # a table of learned positions ends
    far, x = s.with_capacity(reach), s.inputs(1, reach)
    before = np.asarray(far.run(s.params, x)[0])
    if not np.all(np.isfinite(before)):  # a memory may diverge on long rows with scaled parameters: take fresh ones
        params = jax.tree.map(lambda p: p.astype(s.dtype), s.initial)
        before = np.asarray(far.run(params, x)[0])
    else:
        params = s.params
    for t in (t for t in (reach - 1, reach - 2, 2 * reach // 3, 1025, 513, 129, 65) if t < reach):
        after = np.asarray(far.run(params, s.changed(x, np.arange(reach)[None] >= t))[0])
        what = f"outputs before token {t} of a row of {reach} after a change of all tokens from {t} on"
        same(after[:, :t], before[:, :t], what)


@functools.lru_cache(maxsize=2)
def jacobian(s: Subject, packed: bool, tokens: tuple[int, ...]) -> np.ndarray:
    """|d(output at t) / d(input at u)|, projected at random, for t in `tokens`: [t, B, u]."""
    rows = []
    for t in tokens:
        weights = np.where(np.arange(s.length)[None, :, None] == t, s.weights, 0)
        grads = s.pullback(s.params, s.x, s.ids if packed else None, weights)[1]
        rows.append(np.max(np.abs(np.asarray(grads)), axis=-1))
    return np.stack(rows)


def some_tokens(s: Subject, deep: bool) -> tuple[int, ...]:
    """The tokens whose Jacobian is taken: all of a short row."""
    every = 1 if deep or s.length <= 64 else s.length // 32
    return tuple(range(0, s.length, every))


def gradient_of_other_tokens(s: Subject, ids, others) -> np.ndarray | None:
    """For a model: the gradient of the outputs at the other positions with respect to tokens where `others [B, T]`.

    Those tokens use the upper half of the vocabulary, the rest the lower half. The logits of the upper half are left
    out, because tied embeddings would get a gradient through them. None if no parameter named embedding has one row per
    token: then only finite changes can tell.
    """
    half = s.vocab // 2
    tokens = np.where(others, half + s.x % half, s.x % half).astype(np.int32)
    wanted = ~others[..., None] & (np.arange(s.vocab) < half)
    grads = s.pullback(s.params, tokens, ids, np.where(wanted, s.weights, 0))
    found = [(jax.tree_util.keystr(path), g) for path, g in jax.tree_util.tree_leaves_with_path(grads)]
    found = [np.asarray(g) for path, g in found if "embedding" in path and g.shape[0] == s.vocab]
    if len(found) != 1:
        return None
    demand(np.any(found[0][:half] != 0), "the model does not depend on its embedding")
    return found[0][half:]


def no_gradient(found: np.ndarray | None, what: str) -> None:
    """Raises a Breach if a model's tokens have a gradient that they must not have."""
    if found is not None:
        same(found, 0, what, lambda index: f"token id {index[0]} of the upper half")


@law("causality.jacobian")
def no_gradient_from_the_future(s: Subject, deep: bool = False):
    """The Jacobian of outputs by inputs is exactly zero above the diagonal."""
    for packed in (True, False)[: 1 + deep]:
        if s.is_model:
            later = np.broadcast_to(np.arange(s.length) > s.chunk + 1, (ROWS, s.length))
            no_gradient(gradient_of_other_tokens(s, s.ids if packed else None, later), "gradient of later tokens")
            continue
        tokens = some_tokens(s, deep)
        size, t = jacobian(s, packed, tokens), np.asarray(tokens)
        later = np.arange(s.length)[None, None, :] > t[:, None, None]
        zero_jacobian(np.where(later, size, 0), tokens, "the output depends on a later token")
        demand(np.any(size > 0), "no output has a gradient by any input")


def zero_jacobian(size: np.ndarray, tokens: tuple[int, ...], what: str) -> None:
    """Raises a Breach for the largest entry of a part [t, B, u] of the Jacobian that must be zero."""
    demand(np.all(np.isfinite(size)), "the Jacobian is not finite")
    if np.any(size):
        t, row, u = (int(i) for i in np.unravel_index(np.argmax(size), size.shape))
        raise Breach(
            f"{what}: its gradient by token {u} is not zero",
            position=output_position((row, tokens[t])),
            size=float(size[t, row, u]),
        )
