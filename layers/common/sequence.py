"""Rows whose tokens are split over the devices of a mesh axis, in contiguous pieces of equal length.

In a per-device program (`jax.shard_map`), inside `pieces(axis)`, a mixer's tokens and `segment_ids` are those of the
device's piece. Its state is the whole row's: the one it gets is from before the row's first token, the one it returns
from after the row's last, and both are the same on all devices. Device 0 has the first piece.

A memory that maps its state to `transition state + update` is composed: every device computes these two of its piece,
all devices gather them, and each applies those of earlier pieces in order (`chain`). What is sent does not depend on
the number of tokens. Other memories take turns (`in_turn`).

Derivatives are those of `jax.shard_map(..., check_vma=False)`: the cotangent of a value that is the same on all devices
is the sum of what the devices hold.
"""

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from engrax.errors import UserError

SEQUENCE = "sequence"  # the mesh axis

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("axis of the pieces of a row", default=None)


@contextmanager
def pieces(axis: str | None) -> Iterator[None]:
    """In this context, the tokens of rows are split over this axis; None: rows are whole."""
    token = _axis.set(axis)
    try:
        yield
    finally:
        _axis.reset(token)


def is_split() -> bool:
    """Whether rows are split."""
    return _axis.get() is not None


def axis() -> str | None:
    """The mesh axis over which rows are split; None for whole rows."""
    return _axis.get()


def count() -> int:
    """The number of pieces of a row; 1 for whole rows."""
    return lax.axis_size(_axis.get()) if is_split() else 1


def index() -> Int[Array, ""] | int:
    """The place of this device's piece; 0 for whole rows."""
    return lax.axis_index(_axis.get()) if is_split() else 0


def row_sum(x: Array) -> Array:
    """The sum over the pieces of a row."""
    return lax.psum(x, _axis.get()) if is_split() else x


def row_max(x: Array) -> Array:
    """The largest value of the pieces of a row, without gradient."""
    return lax.pmax(lax.stop_gradient(x), _axis.get()) if is_split() else x


def row_min(x: Array) -> Array:
    """The smallest value of the pieces of a row, without gradient."""
    return lax.pmin(lax.stop_gradient(x), _axis.get()) if is_split() else x


def whole(x: Array) -> Array:
    """The pieces of `[B, T, ...]` as one row, on every device."""
    return lax.all_gather(x, _axis.get(), axis=1, tiled=True) if is_split() else x


def moved(tree: Any, by: int = 1) -> Any:
    """What the device `by` places before this one has; the first `by` devices get the last ones'."""
    devices = count()
    there = [(i, (i + by) % devices) for i in range(devices)]
    return jax.tree.map(lambda x: lax.ppermute(x, _axis.get(), there), tree)


def before(tree: Any, first: Any) -> Any:
    """What the device before this one has; `first` on the first."""
    return jax.tree.map(lambda x, y: jnp.where(index() == 0, y, x), moved(tree), first)


def of_last(tree: Any, holds_B: Bool[Array, " B"]) -> Any:
    """For each row, the values `[B, ...]` of its last device where `holds` is true; those of device 0 if none is."""
    at = row_max(jnp.where(holds_B, index(), 0))
    mine = at == index()
    return jax.tree.map(lambda x: row_sum(jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x, 0)), tree)


def chain(step: Callable[[Any, Any], Any], start: Any, summary: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """Returns the state before this piece and the state after the row.

    step(state, summary of a piece) is the state after it; it is applied to all pieces in order, or in reverse order.
    """
    here, axis = index(), _axis.get()
    every = lax.all_gather(summary, axis)

    def body(carry, n_piece):
        state, mine = carry
        n, piece = n_piece
        mine = jax.tree.map(lambda x, y: jnp.where(n == here, x, y), state, mine)
        return (step(state, piece), mine), None

    (after, mine), _ = lax.scan(body, (start, start), (jnp.arange(count()), every), reverse=reverse)
    return mine, after


def segment_before(
    seen: Int[Array, " B"], last: Int[Array, " B"], tokens: Int[Array, " B"], segment: Int[Array, " B"]
) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]:
    """The tokens so far of a row's last segment and its id (-1: none), before this piece; and the tokens after the row.

    seen, last: the same before the row. tokens, segment: of the piece's last segment, -1 if it has no token.
    """

    def step(state, piece):
        (seen, last), (tokens, segment) = state, piece
        counted = tokens + jnp.where(segment == last, seen, 0)
        return jnp.where(segment < 0, seen, counted), jnp.maximum(last, segment)

    (seen, last), (after, _) = chain(step, (seen, last), (tokens, segment))
    return seen, last, after


def in_turn(call: Callable, x: Array, state: Any, segment_ids: Int[Array, "B T"] | None, groups: int) -> tuple:
    """Runs call(x, state, segment_ids) -> (y, state) on the pieces of a row one after the other: (y, row's last state).

    Each device starts when the one before it has finished. Rows are divided into `groups`, and while a device has one
    group the device before it has the next: groups + devices - 1 turns of rows / groups each. The backward pass keeps
    the states between pieces and recomputes the rest.
    """
    axis, here, devices = _axis.get(), index(), count()
    # Neighbouring rows belong to different groups, so that each device of the batch axes keeps its rows.
    split = jax.tree.map(lambda x: x.reshape(-1, groups, *x.shape[1:]).swapaxes(0, 1), (x, state, segment_ids))

    def at(tree, n):
        return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, n, keepdims=False), tree)

    @jax.checkpoint
    def turn(arriving, n, working):
        x, first, ids = at(split, n)
        begins = (here == 0) | ~working  # an idle device computes something finite, which nobody reads
        state = jax.tree.map(lambda x, y: jnp.where(begins, x, y), first, arriving)
        with pieces(None):
            return call(x, state, ids)

    def put(whole, part, n, working):
        part = jnp.where(working, part, lax.dynamic_index_in_dim(whole, n, keepdims=False))
        return lax.dynamic_update_index_in_dim(whole, part, n, 0)

    def body(carry, t):
        arriving, found = carry
        n, working = jnp.clip(t - here, 0, groups - 1), (t >= here) & (t - here < groups)
        done = turn(arriving, n, working)
        found = jax.tree.map(lambda whole, part: put(whole, part, n, working), found, done)
        onward = [(i, i + 1) for i in range(devices - 1)]
        return (jax.tree.map(lambda x: lax.ppermute(x, axis, onward), done[1]), found), None

    first = at(split[1], 0)
    like = jax.eval_shape(turn, first, 0, True)
    found = jax.tree.map(lambda x: jnp.zeros((groups, *x.shape), x.dtype), like)
    (_, found), _ = lax.scan(body, (first, found), jnp.arange(groups + devices - 1))
    y, after = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)
    return y, jax.tree.map(lambda x: row_sum(jnp.where(here == devices - 1, x, 0)), after)


def least_length(length: int, needed: int, what: str) -> None:
    """Raises UserError if a piece of `length` tokens is shorter than `needed`."""
    if is_split() and length < needed:
        raise UserError(
            f"data.seq_len={length * count()} over parallel.sequence={count()} leaves {length} tokens per device, and "
            f"{what} needs {needed}; raise data.seq_len or lower parallel.sequence."
        )
