"""The log-decay kernels' blocks: how calls of any width and with states per segment become what the kernels take.

The kernels take K and V in multiples of 64, and V of at most 128. All changes are exact. Missing features are zeros,
which decay nothing and stay zero. Value columns do not depend on each other given keys and gates, so a wider V is split
into blocks that count as heads of their own: gates, queries, keys and whatever follows from them alone have fewer heads
than the values, and a head finds its own by `parts.own`. Gradients of what blocks share are sums over them.

With one state per segment, a program carries one segment's state along the segment's own chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayShapes
from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, COLUMNS, MOST_PROGRAMS, SIZES

WIDEST = SIZES[-1]  # features of a state's rows, or of a block of values


def unsupported_sizes(shapes: LogDecayShapes, splits_keys: bool) -> str | None:
    """Returns why the log-decay kernels cannot serve a call of these sizes, or None if they can.

    splits_keys: whether K may be wider than a program's state.
    """
    if shapes.dtype != jnp.bfloat16:
        return f"the GPU kernel takes bfloat16 q, k and v, not {shapes.dtype}"
    if shapes.chunk != CHUNK:
        return f"the GPU kernel takes chunks of {CHUNK} tokens, not {shapes.chunk}"
    key, width = padded(shapes.key), _block(shapes.value)
    if key > WIDEST and not splits_keys:
        return (
            f"the GPU kernel of the delta rule or a gate per channel takes K of at most {WIDEST}, not {shapes.key}: a "
            f"state of {key} x {COLUMNS} float32 takes {key * COLUMNS // 128} of a thread's 255 registers"
        )
    rows, heads = shapes.batch * max(1, shapes.segments), shapes.heads * (padded(shapes.value) // width)
    if max(rows, heads) > MOST_PROGRAMS:
        return (
            f"the GPU kernel takes at most {MOST_PROGRAMS} states and as many heads times blocks of {width} values, "
            f"not {rows} and {heads}"
        )
    return None


def padded(features: int) -> int:
    """Returns the next multiple of 64."""
    return -(-features // COLUMNS) * COLUMNS


def _block(value: int) -> int:
    """Returns the columns of a block of values."""
    return WIDEST if padded(value) % WIDEST == 0 else COLUMNS


def key_blocks(key: int) -> list[slice]:
    """Returns the features of each part of K, a multiple of 64, that a program's state can have as rows."""
    return [slice(start, min(start + WIDEST, key)) for start in range(0, key, WIDEST)]


def _pad(x: jax.Array, *sizes: int) -> jax.Array:
    """Pads the last axes with zeros to these sizes."""
    lead = x.ndim - len(sizes)
    missing = [(0, 0)] * lead + [(0, size - have) for size, have in zip(sizes, x.shape[lead:])]
    return jnp.pad(x, missing) if any(after for _, after in missing) else x


def _split_values(v: jax.Array) -> jax.Array:
    """Returns `[B, T, HV, V]` as `[B, T, HV n, V']`: n blocks of V' columns per head."""
    width = _block(v.shape[3])
    return _pad(v, padded(v.shape[3])).reshape(*v.shape[:2], -1, width)


def _join_values(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `[B, T, HV, V]`, the inverse of `_split_values`."""
    return blocks.reshape(*like.shape[:3], -1)[..., : like.shape[3]]


def _split_state(state: jax.Array) -> jax.Array:
    """Returns `[B, *N, HV, K, V]` as `[B N, HV n, K', V']`."""
    (heads, key, value), width = state.shape[-3:], _block(state.shape[-1])
    blocks = _pad(state, padded(key), padded(value)).reshape(-1, heads, padded(key), padded(value) // width, width)
    return blocks.swapaxes(2, 3).reshape(-1, heads * (padded(value) // width), padded(key), width)


def _join_state(blocks: jax.Array, like: jax.Array) -> jax.Array:
    """Returns `[B, *N, HV, K, V]`, the inverse of `_split_state`."""
    heads, key, value = like.shape[-3:]
    state = blocks.reshape(blocks.shape[0], heads, -1, *blocks.shape[2:]).swapaxes(2, 3)
    return state.reshape(*like.shape[:-2], blocks.shape[2], -1)[..., :key, :value]


def axes(inputs, dims):
    """Returns the axes of the inputs and outputs, for `shard_over_batch_and_heads`.

    dims: those of the inputs of a call with one state per row.
    """
    if inputs.layout is None:
        return dims, ("BTHV", "BHKV")
    return dims._replace(state="BNHKV", layout="B"), ("BTHV", "BNHKV")


class Blocks(NamedTuple):
    """What the kernels take of a call, or its cotangents (decay: of `lo`): HB = HV n heads; S = B, or B N states."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T HB V"]
    beta: Float[Array, "B T HV"] | None
    decay: Decay | None  # of HV heads
    state: Float[Array, "S HB K V"]
    bounds: Int[Array, "B N1"] | None  # see `_bounds`; of cotangents: None


def to_blocks(inputs, beta: jax.Array | None = None) -> Blocks:
    """Returns the blocks of an operation's inputs (`LinearInputs`, or `DeltaInputs` and their beta)."""
    key = padded(inputs.q.shape[3])
    decay = inputs.decay
    if decay is not None and decay.hi.ndim == 4:
        decay = jax.tree.map(lambda x: _pad(x, key), decay)
    q, k = _pad(inputs.q, key), _pad(inputs.k, key)
    return Blocks(q, k, _split_values(inputs.v), beta, decay, _split_state(inputs.state), _bounds(inputs))


def _bounds(inputs) -> jax.Array | None:
    """Returns int32 `[B, N + 1]`: segment n has the chunks from bounds[n] up to bounds[n + 1]; None: one state per row.

    Every chunk is in one segment: the empty ones at a row's end are in the last one, and change nothing.
    """
    if inputs.layout is None:
        return None
    numbers = jnp.arange(inputs.state.shape[1] + 1)
    return jnp.sum(inputs.layout.segment[:, None] < numbers[:, None], axis=2, dtype=jnp.int32)


def outputs_to_blocks(outputs):
    """Returns (out, final state) of a call, or their cotangents, as those of its blocks."""
    out, final = outputs
    return _split_values(out), _split_state(final)


def outputs_from_blocks(outputs, inputs):
    """Returns (out, final state) in the shapes of the call, whose inputs are given."""
    out, final = outputs
    return _join_values(out, inputs.v), _join_state(final, inputs.state)


def gradients_from_blocks(bars: Blocks, inputs):
    """Returns the cotangents of an operation's inputs but for beta; those of q, k and the decay are summed already."""
    key = inputs.q.shape[3]
    decay = bars.decay
    if decay is not None and decay.hi.ndim == 4:
        decay = jax.tree.map(lambda x: x[..., :key], decay)
    return inputs._replace(
        q=bars.q[..., :key],
        k=bars.k[..., :key],
        v=_join_values(bars.v, inputs.v),
        decay=decay,
        state=_join_state(bars.state, inputs.state),
        layout=None,
    )


def sum_heads(x: jax.Array, heads: int, axis: int = 2) -> jax.Array:
    """Returns x summed over the consecutive heads (along the axis) that share one of fewer heads."""
    if x.shape[axis] == heads:
        return x
    return x.reshape(*x.shape[:axis], heads, -1, *x.shape[axis + 1 :]).sum(axis + 1)


def sum_groups(gradient: jax.Array, like: jax.Array) -> jax.Array:
    """Returns a gradient `[B, T, HV n, K]` in the shape and dtype of `like`: summed over what shares a query head."""
    return sum_heads(gradient, like.shape[2]).astype(like.dtype)
