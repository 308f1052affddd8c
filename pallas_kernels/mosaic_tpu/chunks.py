"""The log-decay operations on TPU: a kernel walks the chunks of one row and head in order, with the state in VMEM.

An operation supplies two functions of one chunk's tokens (a dict of two-dimensional arrays) and the state `[K, V]`
before the chunk:

    step(tokens, state) -> (out, state after the chunk, extra values to save)
    pull(tokens, state, out_bar, after_bar) -> (cotangents of the tokens, cotangent of the state before)

The forward pass is one kernel. The backward pass is two. The first sweeps forward and stores the state before every
group of chunks. The second takes the groups from last to first: it recomputes each group's states into scratch memory,
then runs backward with the state's cotangent in scratch memory. Letters: B rows, H heads of the state, M chunks, C
tokens of a chunk, K and V features, N segments.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayShapes
from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.common.segments import SegmentLayout
from engrax.pallas_kernels.mosaic_tpu.parts import call, load, store

GROUP = 8  # chunks between two saved states
Tree = Any


class ChunkKernels(NamedTuple):
    """How an operation walks its chunks. name: of its kernels in a profile; wrt: the tokens with cotangents."""

    name: str
    step: Callable
    pull: Callable
    wrt: tuple[str, ...]
    interpret: bool


class Ends(NamedTuple):
    """Where segments with separate states begin and end: each chunk's segment, and whether it is the segment's first or
    last chunk. In a kernel these are references to scalar memory, which index maps read ahead."""

    segment: Int[Array, "B M"]
    first: Int[Array, "B M"]
    last: Int[Array, "B M"]


def ends_of(layout: SegmentLayout | None) -> Ends | None:
    """Returns where the segments of a layout begin and end."""
    if layout is None:
        return None
    last = jnp.take_along_axis(layout.last_chunk, layout.segment, axis=1) == jnp.arange(layout.segment.shape[1])
    last = last & jnp.take_along_axis(layout.has_tokens, layout.segment, axis=1)
    return Ends(*(x.astype(jnp.int32) for x in (layout.segment, layout.first, last)))


def unsupported_sizes(shapes: LogDecayShapes) -> str | None:
    """Returns why the kernels cannot serve a call of these sizes, or None if they can."""
    if shapes.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 or bfloat16 q, k and v, not {shapes.dtype}"
    if shapes.chunk % 16 or shapes.chunk > 256:
        return f"the TPU kernel takes chunks of a multiple of 16 tokens up to 256, not {shapes.chunk}"
    if max(shapes.key, shapes.value) > 512:
        return f"the TPU kernel takes K and V up to 512, not {shapes.key} and {shapes.value}"
    return None


def to_chunks(x: Shaped[Array, "B T H *D"], chunk: int) -> Shaped[Array, "B H M C *D"]:
    """Lays tokens out by head and chunk, since a block must span the last two axes of its array."""
    x = x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
    return x.transpose(0, 3, 1, 2, *range(4, x.ndim))


def to_tokens(x: Shaped[Array, "B H M C *D"]) -> Shaped[Array, "B T H *D"]:
    """Undoes `to_chunks`."""
    x = x.transpose(0, 2, 3, 1, *range(4, x.ndim))
    return x.reshape(x.shape[0], -1, *x.shape[3:])


# ---------------------------------------------------------------------------------------------------------------------
# Decay. One gate per token: a table "gates" with two rows, hi and lo (a column would take the memory of 128).
# One gate per channel: "hi" and "lo" unchanged.


def pack_decay(decay: Decay | None, chunk: int) -> dict[str, Array]:
    """Returns the decay `[B, T, H]` or `[B, T, H, K]` as entries of the tokens."""
    if decay is None:
        return {}
    decay = Decay(*(to_chunks(x, chunk) for x in decay))
    return {"gates": jnp.stack(decay, axis=3)} if decay.hi.ndim == 4 else {"hi": decay.hi, "lo": decay.lo}


def unpack_decay_bar(bars: dict[str, Array], decay: Decay | None) -> Decay | None:
    """Returns the cotangent of the decay, which equals that of its `lo`."""
    if decay is None:
        return None
    lo_bar = to_tokens(bars["gates"][:, :, :, 1] if "gates" in bars else bars["lo"])
    return Decay(jnp.zeros_like(decay.hi), lo_bar)


def load_decay(tokens: dict[str, Array]) -> tuple[Decay, ...]:
    """Returns the decay of a chunk inside a kernel: (), (column, row), or one decay per channel."""
    if "gates" in tokens:
        rows, columns = tokens["gates"], tokens["gates"].T
        return Decay(columns[:, :1], columns[:, 1:]), Decay(rows[:1], rows[1:])
    return (Decay(tokens["hi"], tokens["lo"]),) if "hi" in tokens else ()


def store_decay_bar(lo_bars: tuple[Array, ...]) -> dict[str, Array]:
    """Returns the cotangents to store, given the cotangents of `lo` in the results of `load_decay`."""
    if len(lo_bars) == 2:
        row = lo_bars[0].T + lo_bars[1]
        return {"gates": jnp.concatenate([jnp.zeros_like(row), row])}
    return {"lo": lo_bars[0]} if lo_bars else {}


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _first(ends: Ends | None, n):
    """Whether chunk n takes its state from the initial ones."""
    return n == 0 if ends is None else (n == 0) | (ends.first[pl.program_id(0), n] == 1)


def _last(ends: Ends | None, n, chunks):
    """Whether the state after chunk n is a final one."""
    return n == chunks - 1 if ends is None else ends.last[pl.program_id(0), n] == 1


def _forward_kernel(walk: ChunkKernels, group: int, ends, tokens, state, out, final, more, starts, scratch):
    """Grid (B, H, M). out, more: None if only states are wanted. starts: None, or the state before every group."""
    n = pl.program_id(2)

    @pl.when(_first(ends, n))
    def _():
        scratch[...] = state[...]

    if starts is not None:

        @pl.when(lax.rem(n, group) == 0)
        def _():
            starts[...] = scratch[...]

    out_value, scratch[...], more_value = walk.step(load(tokens), scratch[...])
    if out is None:
        return
    out[...] = out_value.astype(out.dtype)
    if more is not None:
        more[...] = more_value.astype(more.dtype)

    @pl.when(_last(ends, n, pl.num_programs(2)))
    def _():
        final[...] = scratch[...]


def _chunk_of_step(group: int, i):
    """Returns the group's chunk for step i of the backward kernel: forward over all but the last, then back."""
    return jnp.where(i < group, i, 2 * group - 2 - i)


def _backward_kernel(
    walk: ChunkKernels,
    chunks: int,
    group: int,
    ends,
    tokens,
    state,
    starts,
    out_bar,
    final_bar,
    tokens_bar,
    state_bar,
    states,
    carry,
):
    """Grid (B, H, groups, steps). states: scratch for the state before every chunk of the group."""
    i = pl.program_id(3)
    slot = _chunk_of_step(group, i)
    n = (pl.num_programs(2) - 1 - pl.program_id(2)) * group + slot
    forward, backward = (i < group - 1) & (n + 1 < chunks), (i >= group - 1) & (n < chunks)  # the last may be short
    first, last = (f(ends, jnp.minimum(n, chunks - 1)) for f in (_first, partial(_last, chunks=chunks)))

    @pl.when(i == 0)
    def _():
        states[0] = starts[...]

    @pl.when(first)
    def _():
        states[slot] = state[...]

    @pl.when(forward)
    def _():
        states[slot + 1] = walk.step(load(tokens), states[slot])[1]

    @pl.when(backward & (n == chunks - 1))
    def _():
        carry[...] = jnp.zeros(carry.shape, carry.dtype)  # for empty chunks after the last segment

    @pl.when(backward & last)
    def _():
        carry[...] = final_bar[...]

    @pl.when(backward)
    def _():
        bars, carry[...] = walk.pull(load(tokens), states[slot], out_bar[...], carry[...])
        store(tokens_bar, jax.tree.map(lambda ref, x: x.astype(ref.dtype), tokens_bar, bars))

    @pl.when(backward & first)
    def _():
        state_bar[...] = carry[...]
        carry[...] = jnp.zeros(carry.shape, carry.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Calls


def _by_chunk(x, heads: int, chunk_of):
    """Returns the block of one chunk; if x has fewer heads than the state, several state heads share one."""
    share = heads // x.shape[1]

    def index(b, h, *rest):
        return b, h if share == 1 else lax.div(h, share), chunk_of(*rest), 0, 0

    return pl.BlockSpec((None, None, None, *x.shape[3:]), index)


def _by_segment(x, ends: Ends | None, chunk_of):
    """Returns the block of one head's state, of the chunk's segment if there are segments."""
    if ends is None:
        return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, *_: (b, h, 0, 0))

    def index(b, h, *rest):
        return b, rest[-3][b, chunk_of(*rest)], h, 0, 0

    return pl.BlockSpec((None, None, None, *x.shape[3:]), index)


def _shape(shape, dtype):
    return jax.ShapeDtypeStruct(tuple(shape), dtype)


def _kernel(body, ends: Ends | None):
    """Returns the body as a kernel, with or without the three arrays of `Ends` in scalar memory."""
    if ends is None:
        return partial(body, None)
    return lambda segment, first, last, *refs: body(Ends(segment, first, last), *refs)


def _forward(walk: ChunkKernels, more, group: int | None, tokens, state, ends: Ends | None):
    """Returns (out, final state, more, starts). With a group, all but starts are None; otherwise starts is None."""
    v = tokens["v"]
    batch, heads, chunks = v.shape[:3]
    states = state.shape[-2:]
    out = final = starts = None
    if group is None:
        out, final = _shape(v.shape, v.dtype), _shape(state.shape, state.dtype)
        more = None if more is None else _shape((*v.shape[:3], *more.shape), more.dtype)
    else:
        more, starts = None, _shape((batch, heads, -(-chunks // group), *states), state.dtype)

    def here(n, *_):
        return n

    def specs(tree, chunk_of=here):
        return jax.tree.map(lambda x: _by_chunk(x, heads, chunk_of), tree)

    return call(
        _kernel(lambda ends, *refs: _forward_kernel(walk, group or 1, ends, *refs), ends),
        name=f"{walk.name}_forward" if group is None else f"{walk.name}_backward_states",
        grid=(batch, heads, chunks),
        parallel=2,
        prefetch=() if ends is None else tuple(ends),
        inputs=(tokens, state),
        in_specs=(specs(tokens), _by_segment(state, ends, here)),
        outputs=(out, final, more, starts),
        out_specs=(
            specs(out),
            None if final is None else _by_segment(final, ends, here),
            specs(more),
            specs(starts, lambda n, *_: lax.div(n, group)),
        ),
        scratch=(pltpu.VMEM(states, state.dtype),),
        interpret=walk.interpret,
    )


def _backward(walk: ChunkKernels, group: int, tokens, state, starts, ends: Ends | None, out_bar, final_bar):
    """Returns the cotangents of the tokens, per head of the state, and of the state."""
    batch, heads, chunks = out_bar.shape[:3]
    groups, steps = starts.shape[2], 2 * group - 1

    def here(g, i, *_):
        return jnp.minimum((groups - 1 - g) * group + _chunk_of_step(group, i), chunks - 1)

    def written(g, i, *_):  # while the group runs forward: the first chunk written on the way back
        return jnp.minimum((groups - 1 - g) * group + jnp.minimum(group - 1, steps - 1 - i), chunks - 1)

    def specs(tree, chunk_of=here):
        return jax.tree.map(lambda x: _by_chunk(x, heads, chunk_of), tree)

    def bar(x):
        return _shape((batch, heads, *x.shape[2:]), x.dtype if x.shape[1] == heads else jnp.float32)

    tokens_bar = {name: bar(tokens[name]) for name in walk.wrt}
    return call(
        _kernel(lambda ends, *refs: _backward_kernel(walk, chunks, group, ends, *refs), ends),
        name=f"{walk.name}_backward",
        grid=(batch, heads, groups, steps),
        parallel=2,
        prefetch=() if ends is None else tuple(ends),
        inputs=(tokens, state, starts, out_bar, final_bar),
        in_specs=(
            specs(tokens),
            _by_segment(state, ends, here),
            specs(starts, lambda g, *_: groups - 1 - g),
            specs(out_bar, written),
            _by_segment(final_bar, ends, written),
        ),
        outputs=(tokens_bar, _shape(state.shape, state.dtype)),
        out_specs=(specs(tokens_bar, written), _by_segment(state, ends, written)),
        scratch=(pltpu.VMEM((group, *state.shape[-2:]), state.dtype), pltpu.VMEM(state.shape[-2:], state.dtype)),
        interpret=walk.interpret,
    )


_CHUNKS = "BHMCD"  # the axes of tokens, for `shard_over_batch_and_heads`


def _state_dims(layout: SegmentLayout | None) -> str:
    return "BHKV" if layout is None else "BNHKV"


def _of_segments(layout: SegmentLayout | None, new, old):
    """Returns `new`, or `old` for segments without tokens."""
    return new if layout is None else jnp.where(layout.has_tokens[:, :, None, None, None], new, old)


def walk_forward(
    walk: ChunkKernels, tokens: Tree, state: Float[Array, "B *N H K V"], layout: SegmentLayout | None, more=None
):
    """Returns (out `[B, H, M, C, V]`, final state, the values `step` saves).

    tokens: a dict of arrays `[B, H or fewer, M, ., .]`, where "v" has H heads. more: the type of the values that `step`
    saves per chunk, a `jax.ShapeDtypeStruct` with two axes.
    """
    dims = _state_dims(layout)
    run = shard_over_batch_and_heads(
        partial(_forward, walk, more, None), (_CHUNKS, dims, "BM"), (_CHUNKS, dims, _CHUNKS, None)
    )
    out, final, saved, _ = run(tokens, state, ends_of(layout))
    return out, _of_segments(layout, final, state), saved


def walk_backward(
    walk: ChunkKernels,
    tokens: Tree,
    state: Float[Array, "B *N H K V"],
    layout: SegmentLayout | None,
    out_bar,
    final_bar,
):
    """Returns the cotangents of tokens and state."""
    dims, ends = _state_dims(layout), ends_of(layout)
    group = min(GROUP, out_bar.shape[2])
    sweep = shard_over_batch_and_heads(
        partial(_forward, walk, None, group), (_CHUNKS, dims, "BM"), (None, None, None, _CHUNKS)
    )
    starts = sweep(tokens, state, ends)[3]
    run = shard_over_batch_and_heads(
        partial(_backward, walk, group), (_CHUNKS, dims, _CHUNKS, "BM", _CHUNKS, dims), (_CHUNKS, dims)
    )
    bars, state_bar = run(tokens, state, starts, ends, out_bar, final_bar)
    bars = {name: _sum_shared(x, tokens[name]) for name, x in bars.items()}
    return bars, _of_segments(layout, state_bar, final_bar)


def _sum_shared(bar, like):
    """Sums a cotangent over the state heads that share a token head."""
    if bar.shape[1] == like.shape[1]:
        return bar
    bar = bar.reshape(bar.shape[0], like.shape[1], -1, *bar.shape[2:])
    return jnp.sum(bar, axis=2).astype(like.dtype)
