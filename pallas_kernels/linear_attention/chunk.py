"""One chunk of one head of linear attention as two-dimensional arrays, shared by the kernels and the XLA form.

With G the cumulative log decay of the chunk, S the state before it and C its last token:

    out_i = scale (exp(G_i) q_i S + sum_{j<=i} (q_i . k_j) exp(G_i - G_j) v_j)
    S'    = exp(G_C) S + sum_j exp(G_C - G_j) k_j^T v_j

Scalar decay is given as both a column and a row, since a kernel cannot cheaply convert one to the other.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay, channel_scores, difference
from engrax.pallas_kernels.common.matmul import COLUMNS, ROWS, Operands, dot


class ScalarDecay(NamedTuple):
    """The cumulative decay of one head's tokens, twice: hi and lo `[C, 1]` and `[1, C]`."""

    column: Decay
    row: Decay


ChunkDecay = None | ScalarDecay | Decay  # no gate, one per token, one per token and channel (hi and lo [C, K])


def _last(decay: Decay) -> Decay:
    return Decay(decay.hi[-1:], decay.lo[-1:])


def _total(decay: Decay) -> Float[Array, "..."]:
    return decay.hi + decay.lo


def causal(size: int, strict: bool = False):
    """Returns the [size, size] mask of the tokens j visible to token i: j <= i, or j < i if strict."""
    i = lax.broadcasted_iota(jnp.int32, (size, size), 0)
    j = lax.broadcasted_iota(jnp.int32, (size, size), 1)
    return j < i if strict else j <= i


def decay_matrix(decay: ScalarDecay, strict: bool = False) -> Float[Array, "C C"]:
    """Returns exp(G_i - G_j) for the tokens j visible to token i, zero elsewhere."""
    mask = causal(decay.column.hi.shape[0], strict)
    return jnp.where(mask, jnp.exp(jnp.where(mask, difference(decay.column, decay.row), 0)), 0)


def read(
    q: Float[Array, "C K"],
    k: Float[Array, "C K"],
    v: Float[Array, "C V"],
    decay: ChunkDecay,
    state: Float[Array, "K V"],
    *,
    scale: float,
    dtype: Operands,
) -> Float[Array, "C V"]:
    """Returns the outputs of a chunk. Arrays have the accumulator's dtype; products round their operands to `dtype`."""
    if decay is None:
        scores = jnp.where(causal(q.shape[0]), dot(q, k, COLUMNS, COLUMNS, dtype), 0)
        carried = dot(q, state, COLUMNS, ROWS, dtype)
    elif isinstance(decay, ScalarDecay):
        scores = dot(q, k, COLUMNS, COLUMNS, dtype) * decay_matrix(decay)
        carried = jnp.exp(_total(decay.column)) * dot(q, state, COLUMNS, ROWS, dtype)
    else:
        (scores,) = channel_scores((q,), k, decay, dtype)
        carried = dot(q * jnp.exp(_total(decay)), state, COLUMNS, ROWS, dtype)
    return scale * (carried + dot(scores, v, COLUMNS, ROWS, dtype))


def write(
    k: Float[Array, "C K"], v: Float[Array, "C V"], decay: ChunkDecay, *, dtype: Operands
) -> tuple[Float[Array, "#K 1"] | None, Float[Array, "K V"]]:
    """Returns (keep, update): the state after the chunk is keep * state + update; keep None: 1."""
    if decay is None:
        return None, dot(k, v, ROWS, ROWS, dtype)
    tokens = decay.column if isinstance(decay, ScalarDecay) else decay
    last = _last(tokens)
    update = dot(k * jnp.exp(difference(last, tokens)), v, ROWS, ROWS, dtype)
    return jnp.exp(_total(last)).reshape(-1, 1), update


def chunk(q, k, v, decay: ChunkDecay, state, *, scale: float, dtype: Operands):
    """Returns (outputs, state after the chunk)."""
    keep, update = write(k, v, decay, dtype=dtype)
    after = state + update if keep is None else keep * state + update
    return read(q, k, v, decay, state, scale=scale, dtype=dtype), after
