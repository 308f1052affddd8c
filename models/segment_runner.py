"""The runner of segment-recurrent models (`models/segment_recurrence.py`): any number of tokens, from any position.

Rows may start and end at different offsets in their segments. Padding follows a row's tokens and does not count: a row
that ends before the others keeps its incomplete segment.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from engrax.layers.common.segments import last_segment_after, newest
from engrax.models.remat import REMAT
from engrax.pallas_kernels.common.segments import FILLER, PADDING


class Running(NamedTuple):
    """The state for continuing at any position; its size does not depend on the number of segments."""

    memory: Any  # the model's memory of earlier segments, with a batch axis in every leaf
    backbone: Any  # its state inside the current segment
    recent: Int[Array, "B W"]  # the row's last W tokens, -1 for filler or another document
    offset: Int[Array, " B"]  # tokens and filler of the current segment so far
    has_tokens: Bool[Array, " B"]  # the current segment holds a token of the row's last document
    last_segment: Int[Array, " B"]
    segments_since_cut: Int[Array, " B"]  # segments since gradients through the memory were cut, below `bptt_segments`


class Read(NamedTuple):
    """The backbone's results for the vectors of a segment or of a part of one."""

    hidden: Float[Array, "B S D"]
    state: Any  # the backbone's state after the last vector
    made: Any  # results of its layers for `update_memory`
    aux: Float[Array, " B"]  # its auxiliary loss
    collected: dict[str, Array]  # its diagnostics


class Call(NamedTuple):
    """Static settings of a backbone call."""

    collect: tuple[str, ...] = ()
    mute: tuple[str, ...] = ()
    closing: int = 0  # number of suffix vectors


class SegmentRunner:
    """One call of a segment-recurrent model."""

    def __init__(self, model: Any, batch_size: int, collect: tuple[str, ...] = (), mute=(), *, padded: bool = True):
        self.model, self.config = model, model.config
        self.length = model.config.segment_length
        self.call, self.padded = Call(collect, mute), padded  # padded: padding may follow the tokens of a row
        self.start = model.init_memory(batch_size)
        self.axes = model.memory_axes(self.start)
        own = model.config.registered_name
        self.forgets = own in mute or "*" in mute

    def __call__(self, state: Running, tokens, ids) -> tuple[Array, Running, Array, dict[str, Array]]:
        """Returns (hidden, state, auxiliary loss, diagnostics).

        If all rows are at offset 0, it runs segment by segment; if all offsets are multiples of a block size, block by
        block; otherwise token by token. Only the first path collects diagnostics."""
        hidden, state, aux, collected = self.by_path(state, tokens, ids)
        return hidden, state, aux / jnp.maximum(self.count(ids), 1), collected

    def by_path(self, state: Running, tokens, ids):
        """Runs the call; here and below, auxiliary losses are summed over the tokens of a row."""
        T, L = tokens.shape[1], self.length
        if isinstance(state.offset, np.ndarray) and not state.offset.any():
            return self.from_grid(state, tokens, ids)
        self.call = self.call._replace(collect=())
        at = self.model.insert_at
        size = int(np.gcd.reduce([T, L] + ([at] if at and T % L else [])))
        if size == 1 or T == 1:
            return self.by_blocks(state, tokens, ids, 1)
        fast = self.from_grid if size == L else lambda *args: self.by_blocks(*args, size)
        on_grid = jnp.all(state.offset % size == 0)
        return jax.lax.cond(on_grid, fast, lambda *args: self.by_blocks(*args, 1), state, tokens, ids)

    def from_grid(self, state: Running, tokens, ids):
        """Whole segments, then the rest of the row; all rows are at offset 0."""
        T = tokens.shape[1]
        whole = T // self.length * self.length
        state = state._replace(backbone=None, offset=jnp.zeros(len(tokens), jnp.int32))
        hidden, aux, collected = [], 0.0, {}
        if whole:
            state, (found, lost, collected) = self.segments(state, tokens[:, :whole], ids[:, :whole])
            hidden.append(found)
            aux = aux + lost
        complete = state
        if whole < T:
            state, (found, lost, rest) = self.segment(state, tokens[:, whole:], ids[:, whole:])
            hidden.append(found)
            aux = aux + lost
            collected = _with_rest(collected, rest, len(tokens), whole, T - whole)
        else:
            state = state._replace(backbone=self.start.backbone)
        if self.padded and whole and self.length > 1:
            state = self.with_incomplete(complete, state, tokens, ids)
        return jnp.concatenate(hidden, axis=1), state, aux, collected

    def with_incomplete(self, complete: Running, state: Running, tokens, ids) -> Running:
        """The state after every row's last tokens, if some rows end inside a segment that others complete.

        complete: the state after the complete segments of every row. Only the state is computed here; if it is not
        used, as in training, nothing is computed."""
        end, whole = self.count(ids), tokens.shape[1] // self.length * self.length
        begin = end // self.length * self.length
        places = begin[:, None] + jnp.arange(self.length - 1)

        def own(x, fill):
            return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=fill))(x, places)

        def again():
            return self.segment(complete, own(tokens, 0), own(ids, PADDING))[0]

        return jax.lax.cond(jnp.any((begin < end) & (end < whole)), again, lambda: state)

    def count(self, ids: Int[Array, "B S"]) -> Int[Array, " B"]:
        """The number of tokens and filler of each row, before its padding."""
        if not self.padded:
            return jnp.full(len(ids), ids.shape[1], jnp.int32)
        return jnp.sum(ids != PADDING, axis=1, dtype=jnp.int32)

    def segments(self, state: Running, tokens, ids):
        """Scans whole segments; for the backward pass only the memory before every `bptt_segments` is kept.

        Returns (state, (hidden, auxiliary loss, diagnostics))."""
        B, T = tokens.shape
        policy, bptt_segments = REMAT[self.config.remat], self.config.bptt_segments
        xs = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, -1, self.length), 1, 0), (tokens, ids))

        def step(state, x):
            return self.segment(state, *x)

        step = step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=False)

        def scan(state, xs):
            return jax.lax.scan(step, state, xs)

        n = T // self.length
        if bptt_segments is None or bptt_segments >= n:
            state, found = scan(state, xs)
        else:
            scan = jax.checkpoint(scan, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
            groups, rest = n // bptt_segments, n % bptt_segments
            head = jax.tree.map(lambda x: x[: n - rest].reshape(groups, bptt_segments, *x.shape[1:]), xs)
            state, found = jax.lax.scan(scan, state, head)
            found = jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:]), found)
            if rest:
                state, last = scan(state, jax.tree.map(lambda x: x[n - rest :], xs))
                found = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), found, last)
        hidden, aux, collected = found
        collected = {name: _over_segments(values, B, self.length) for name, values in collected.items()}
        return state, (jnp.moveaxis(hidden, 0, 1).reshape(B, T, -1), jnp.sum(aux, axis=0), collected)

    def segment(self, state: Running, tokens, ids):
        """A whole segment, or the first part of one, in one backbone call; all rows are at offset 0.

        Returns (state, (hidden, auxiliary loss, diagnostics)). Rows that do not complete a whole segment keep the
        state before it."""
        model, at, n = self.model, self.model.insert_at, tokens.shape[1]
        complete, count, before = n == self.length, self.count(ids), state
        state = self.enter(state, ids[:, 0], count > 0)
        owner = state.last_segment
        memory, opening, counts = model.prefix(state.memory, state.recent, self.ahead(tokens, ids, owner))
        state = state._replace(memory=self.keep(count > 0, memory, state.memory))
        embedded = model.backbone.embed(tokens)
        pieces = [(opening, self.reached(count > 0, _owned(owner, counts)))]
        first = at if at is not None and n > at else 0
        if first:
            state = self.take(state, tokens[:, :first], ids[:, :first])
            memory, inserted = model.infix(state.memory, state.recent)
            state = state._replace(memory=self.keep(count > first, memory, state.memory))
            pieces.append((embedded[:, :first], ids[:, :first]))
            pieces.append((inserted, self.reached(count > first, self.of_last(state, inserted))))
        memory = state.memory
        state = self.take(state, tokens[:, first:], ids[:, first:])
        pieces.append((embedded[:, first:], ids[:, first:]))
        closing = model.suffix(state.memory) if complete else embedded[:, :0]
        pieces.append((closing, self.reached(count == n, self.of_last(state, closing))))
        x, all_ids = (jnp.concatenate(parts, axis=1) for parts in zip(*pieces))
        read = model.read(x, all_ids, None, memory, owner, self.call._replace(closing=closing.shape[1]))
        if complete:
            after = self.leave(state, read.hidden[:, x.shape[1] - closing.shape[1] :], read.made)
            state = self.choose(count == n, after, before) if self.padded else after
        else:
            state = state._replace(backbone=read.state, offset=state.offset + count)
        end, spans = opening.shape[1], []
        for size in (first, n - first):  # the infix, if any, is between them
            spans.append(slice(end, end + size))
            end += size + (pieces[2][0].shape[1] if first else 0)
        collected = {name: _of_tokens(values, x.shape[:2], spans) for name, values in read.collected.items()}
        return state, (jnp.concatenate([read.hidden[:, span] for span in spans], axis=1), read.aux * count, collected)

    def by_blocks(self, state: Running, tokens, ids, size: int):
        """Runs blocks of `size` tokens; segments end only at the end of a block."""
        B, T = tokens.shape
        if T == size:
            state, (hidden, aux) = self.block(state, tokens, ids)
            return hidden, state, aux, {}
        xs = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, -1, size), 1, 0), (tokens, ids))

        def step(state, x):
            return self.block(state, *x)

        # Without it, residuals of a block would be kept for the backward pass even if `__call__` takes another path.
        step = jax.checkpoint(step, policy=jax.checkpoint_policies.nothing_saveable, prevent_cse=False)
        state, (hidden, aux) = jax.lax.scan(step, state, xs)
        return jnp.moveaxis(hidden, 0, 1).reshape(B, T, -1), state, jnp.sum(aux, axis=0), {}

    def block(self, state: Running, tokens, ids) -> tuple[Running, tuple[Array, Array]]:
        """Some tokens of a segment, with rows at different offsets: (state, (hidden, auxiliary loss))."""
        model, count = self.model, self.count(ids)
        begins = (state.offset == 0) & (count > 0)
        state = self.enter(state, ids[:, 0], begins)
        ahead = self.ahead(tokens, ids, state.last_segment)
        state = self.where(begins, lambda state: self.begin(state, ahead), state)
        if model.insert_at is not None:
            state = self.where((state.offset == model.insert_at) & (count > 0), self.inserted, state)
        x = model.backbone.embed(tokens)
        read = model.read(x, ids, state.backbone, state.memory, state.last_segment, self.call)
        state = state._replace(backbone=read.state, offset=state.offset + count)
        state = self.take(state, tokens, ids)
        return self.where(state.offset == self.length, self.finish, state), (read.hidden, read.aux * count)

    def begin(self, state: Running, ahead) -> Running:
        """The prefix, read from the backbone's empty state."""
        memory, opening, counts = self.model.prefix(state.memory, state.recent, ahead)
        backbone = self.start.backbone
        if opening.shape[1]:
            ids = _owned(state.last_segment, counts)
            backbone = self.model.read(opening, ids, None, memory, state.last_segment, self.call).state
        return state._replace(memory=memory, backbone=backbone)

    def inserted(self, state: Running) -> Running:
        memory, x = self.model.infix(state.memory, state.recent)
        ids = self.of_last(state, x)
        read = self.model.read(x, ids, state.backbone, memory, state.last_segment, self.call)
        return state._replace(memory=memory, backbone=read.state)

    def finish(self, state: Running) -> Running:
        x = self.model.suffix(state.memory)
        ids = self.of_last(state, x)
        call = self.call._replace(closing=x.shape[1])
        read = self.model.read(x, ids, state.backbone, state.memory, state.last_segment, call)
        return self.leave(state, read.hidden, read.made)._replace(backbone=self.start.backbone)

    def enter(self, state: Running, first_id: Int[Array, " B"], at: Bool[Array, " B"]) -> Running:
        """Starts a segment in the rows `at`: a new document gets an empty memory; gradients are cut if due."""
        last = state.last_segment
        anew = at & (first_id >= 0) & (last >= 0) & (first_id != last)
        if self.forgets:  # muted: every segment starts from an empty memory
            anew = anew | at
        memory = state.memory
        if self.config.bptt_segments is not None:  # a document's initial memory is a parameter and keeps its gradient
            cut = at & (state.segments_since_cut == 0) & (last >= 0)
            memory = self.select(cut, jax.lax.stop_gradient(memory), memory)
        memory = self.select(anew, self.start.memory, memory)
        return state._replace(
            memory=memory,
            recent=jnp.where(anew[:, None], -1, state.recent),
            has_tokens=state.has_tokens & ~at,
            last_segment=jnp.where(at, jnp.maximum(last, first_id), last),
        )

    def take(self, state: Running, tokens, ids) -> Running:
        """Updates the state from the tokens; if a new document has started, its memory is empty."""
        last = last_segment_after(state.last_segment, ids)
        changed = (state.last_segment >= 0) & (last != state.last_segment)
        own = (ids == last[:, None]) & (ids >= 0)
        recent = jnp.concatenate(
            [jnp.where(changed[:, None], -1, state.recent), jnp.where(own, tokens, -1).astype(jnp.int32)], axis=1
        )
        recent = newest(recent, state.recent.shape[1], self.count(ids) if self.padded else None)
        return state._replace(
            memory=self.select(changed, self.start.memory, state.memory),
            recent=recent,
            has_tokens=(state.has_tokens & ~changed) | jnp.any(own, axis=1),
            last_segment=last,
        )

    def leave(self, state: Running, hidden, made) -> Running:
        """Ends a segment: the memory is written if the segment holds a token of the row's last document."""
        written = self.model.update_memory(state.memory, hidden, made)
        segments_since_cut = (
            state.segments_since_cut
            if self.config.bptt_segments is None
            else (state.segments_since_cut + 1) % self.config.bptt_segments
        )
        return state._replace(
            memory=self.select(state.has_tokens, written, state.memory),
            offset=jnp.zeros_like(state.offset),
            segments_since_cut=segments_since_cut,
        )

    def ahead(self, tokens, ids, owner):
        """The tokens of the document, -1 for all others."""
        return jnp.where((ids == owner[:, None]) & (ids >= 0), tokens, -1)

    def of_last(self, state: Running, x):
        """Segment ids for vectors of the row's last document."""
        return _owned(state.last_segment, jnp.ones(x.shape[:2], bool))

    def where(self, rows: Bool[Array, " B"], change, state: Running) -> Running:
        """`change(state)` in the given rows; not computed if there are none."""

        def some(state):
            return self.choose(rows, change(state), state)

        return jax.lax.cond(jnp.any(rows), some, lambda state: state, state)

    def choose(self, rows: Bool[Array, " B"], when_true: Running, when_false: Running) -> Running:
        """`jnp.where` over the rows of two states, with the backbone's or without."""
        axes = self.axes if when_false.backbone is not None else self.axes._replace(backbone=None)
        return _select(rows, when_true, when_false, axes)

    def keep(self, rows: Bool[Array, " B"], new: Any, old: Any) -> Any:
        """The new memory in the rows that reach it; in all rows if there is no padding."""
        return self.select(rows, new, old) if self.padded else new

    def reached(self, rows: Bool[Array, " B"], ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
        """Segment ids of vectors that only the given rows reach; in the other rows they are padding."""
        return jnp.where(rows[:, None], ids, PADDING) if self.padded else ids

    def select(self, rows: Bool[Array, " B"], when_true: Any, when_false: Any) -> Any:
        """`jnp.where` over the rows of two memories."""
        return _select(rows, when_true, when_false, self.axes.memory)


def _of_tokens(values: Array, slots: tuple[int, int], spans: list[slice]) -> Array:
    """Restricts a diagnostic [repeat, B, S, ...] to the slots of tokens; diagnostics of other shapes are unchanged."""
    if values.shape[1:3] != slots:
        return values
    return jnp.concatenate([values[:, :, span] for span in spans], axis=2)


def _over_segments(values: Array, rows: int, length: int) -> Array:
    """A diagnostic of all segments [N, repeat, ...]: per token [repeat, B, T, ...], or the mean over segments."""
    if values.shape[2:4] != (rows, length):
        return jnp.mean(values, axis=0)
    values = jnp.moveaxis(values, 0, 2)
    return values.reshape(*values.shape[:2], -1, *values.shape[4:])


def _with_rest(whole: dict[str, Array], rest: dict[str, Array], rows: int, done: int, length: int) -> dict[str, Array]:
    """Diagnostics of whole segments and of the tokens of an incomplete last segment, or of the last segment alone."""
    if not done:
        return rest
    at_tokens = {name for name, values in rest.items() if values.shape[1:3] == (rows, length)}
    return {
        name: jnp.concatenate([values, rest[name]], axis=2) if name in at_tokens else values
        for name, values in whole.items()
    }


def _owned(owner: Int[Array, " B"], counts: Bool[Array, "B S"]) -> Int[Array, "B S"]:
    """Segment ids of vectors of the document `owner`. Vectors that do not count become filler, so positions do not
    move."""
    return jnp.where(counts & (owner >= 0)[:, None], owner[:, None], FILLER)


def _select(rows, when_true, when_false, axes):
    """`jnp.where` over the rows of two trees with the batch axes `axes`, in the dtypes of the second tree."""

    def pick(a, b, axis):
        shape = [1] * jnp.ndim(b)
        shape[axis] = len(rows)
        return jnp.where(rows.reshape(shape), jnp.asarray(a, b.dtype), b)

    return jax.tree.map(pick, when_true, when_false, axes)
