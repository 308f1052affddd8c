"""Laws 1 and 2: all implementations agree, and a call may end and the next begin at any position."""

import dataclasses
import functools

import numpy as np

from engrax.errors import UserError
from engrax.laws.breach import close, close_trees, law, output_position
from engrax.laws.kernels import kernels_agree
from engrax.laws.layouts import ROWS, trailing_padding, with_gap
from engrax.laws.subject import Subject
from engrax.pallas_kernels.common.segments import FILLER, PADDING


@law("paths.implementations")
def implementations_agree(s: Subject, deep: bool = False):
    """All implementations agree, if the config has the choice: kernels are interpreted; deep: gradients too."""
    for name in _choices(s.config) if s.thorough or deep else _choices(s.config)[:1]:  # the xla form is the default
        wanted, _ = s.run(s.params, s.x, None, s.ids)
        other = s.variant(dataclasses.replace(s.config, implementation=name))
        y, _ = other.run(s.params, s.x, None, s.ids)
        close(s.shown(y, s.ids), s.shown(wanted, s.ids), f"implementation {name!r}", s.rounding)
        if deep:
            args = (s.params, s.x, s.ids, s.weights)
            what = f"gradients of implementation {name!r}"
            close_trees(other.pullback(*args), s.pullback(*args), what, s.gradient_rounding)
    if _choices(s.config) and (s.thorough or deep):
        kernels_agree(s, deep)


def _choices(config) -> tuple[str, ...]:
    """The implementations that run everywhere, if the config's `implementation` may name them."""
    try:
        dataclasses.replace(config, implementation="reference")
    except (TypeError, UserError):  # it has no such field; its memory is not the operation's
        return ()
    return ("reference", "xla")


def by_single_tokens(s: Subject, ids):
    """Outputs [B, T, D] of T calls of one token, and the states before the first tokens."""
    state, outputs, states = s.start(s.params, ROWS), [], []
    for t in range(s.length):
        if t < s.chunk + 2:  # the laws start from these; a cache may be large
            states.append(state)
        y, state = s.run(s.params, s.x[:, t : t + 1], state, None if ids is None else ids[:, t : t + 1])
        outputs.append(y)
    return np.concatenate(outputs, axis=1), states


@law("state_carry.steps")
def full_pass_equals_single_tokens(s: Subject, deep: bool = False):
    """One call equals T calls of one token."""
    for ids in s.layouts(deep):
        wanted, _ = s.run(s.params, s.x, None, ids)
        what = f"token by token against one call, {'one segment' if ids is None else 'packed'}"
        close(s.shown(by_single_tokens(s, ids)[0], ids), s.shown(wanted, ids), what, s.rounding)
        if ids is None:
            first, _ = s.run(s.params, s.x[:, :1])
            close(first, wanted[:, :1], "a call of one token from state=None", s.rounding)


@law("state_carry.cuts")
def cuts_continue(s: Subject, deep: bool = False):
    """f(x) equals f(x[:, :a]) followed by f(x[:, a:], state); deep: for cuts at ends, in and on the chunk grid."""
    # Each cut compiles two programs; `state_carry.blocks` covers every cut of a chunk with one program.
    many = sorted({1, s.chunk - 1, s.chunk, s.chunk + 1, 2 * s.chunk + 3, s.length - 1} - {0})
    for ids in (None, s.ids) if deep else (None,):
        wanted, _ = s.run(s.params, s.x, None, ids)
        for a in many if deep else (s.chunk + 1,):
            head, tail = (None, None) if ids is None else (ids[:, :a], ids[:, a:])
            first, state = s.run(s.params, s.x[:, :a], None, head)
            second, _ = s.run(s.params, s.x[:, a:], state, tail)
            both = np.concatenate([first, second], axis=1)
            close(s.shown(both, ids), s.shown(wanted, ids), f"two calls, cut at {a} of {s.length} tokens", s.rounding)


@law("state_carry.blocks")
def every_cut_continues(s: Subject, deep: bool = False):
    """Two calls of chunk + 3 tokens that start at every position of a chunk: each row has another cut."""
    block, starts = s.chunk + 3, range(s.chunk + 2)
    for ids, rows in ((s.ids, (0, 1)), (None, (0,)))[: 1 + deep]:
        wanted, _ = s.run(s.params, s.x, None, ids)
        wanted = s.shown(wanted, ids)
        _, states = by_single_tokens(s, ids)
        state = s.join_rows([s.take_rows(states[a], rows) for a in starts])
        for offset in (0, block):

            def cut(array, offset=offset, rows=rows):
                return np.concatenate([array[np.asarray(rows), a + offset : a + offset + block] for a in starts])

            def place(index, offset=offset, rows=rows):
                first = index[0] // len(rows) + offset
                return output_position((rows[index[0] % len(rows)], *index[1:]), first)

            here = None if ids is None else cut(ids)
            y, state = s.run(s.params, cut(s.x), state, here)
            what = f"call {1 + offset // block} of {block} tokens, from every position of a chunk"
            close(s.shown(y, here), cut(wanted), what, s.rounding, place)


@law("state_carry.padding")
def cuts_inside_padding_and_filler_continue(s: Subject, deep: bool = False):
    """A call cut inside padding or filler leaves the same state as the whole call, and later calls give the same. So
    does a call with only padding or filler. A model is also cut inside padding before or between its tokens."""
    a = s.chunk + 5
    layouts = {
        "inside the padding after its tokens": trailing_padding(s.one_segment, [s.chunk + 3] * ROWS),
        "inside filler": with_gap(a, s.length, FILLER),
    }
    if s.is_model:
        layouts["inside the padding between its tokens"] = with_gap(a, s.length, PADDING)
    for where, ids in layouts.items():
        wanted, whole = s.run(s.params, s.x, None, ids)
        first, state = s.run(s.params, s.x[:, :a], None, ids[:, :a])
        second, cut = s.run(s.params, s.x[:, a:], state, ids[:, a:])
        both = np.concatenate([first, second], axis=1)
        close(s.shown(both, ids), s.shown(wanted, ids), f"two calls, cut at {a}, {where}", s.rounding)
        last = ids.max(axis=1, keepdims=True)
        for t in range(4):
            after, whole = s.run(s.params, s.x[:, t : t + 1], whole, last)
            again, cut = s.run(s.params, s.x[:, t : t + 1], cut, last)
            what = f"tokens after a row cut {where}, against the row in one call"
            close(again, after, what, s.rounding, functools.partial(output_position, first_token=s.length + t))


@law("state_carry.gradients")
def gradients_agree_through_the_state(s: Subject, deep: bool = False):
    """One call and several calls with the state between them have the same gradients."""
    cuts = (s.chunk + 3, s.chunk + 4) if deep else (s.chunk + 4,)
    for ids in (None, s.ids) if deep else (s.ids,):
        args = (s.params, s.x, ids, s.weights)
        what = f"gradients through cuts at {cuts}"
        close_trees(s.pullback(*args, cuts=cuts), s.pullback(*args), what, s.gradient_rounding)
