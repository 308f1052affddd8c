"""Token-by-token decoding of the neural memory with pending writes; it has no gradients.

A one-token call that returns the whole state reads and writes every matrix. Here the matrices stay unchanged, and the
last writes are pending: they are stored beside the matrices as vectors. With matrices W_0, S_0 and m pending writes

    W_t = a W_0 + b S_0 - sum_{i<=m} c_i x_i^T delta_i        S_t = p S_0 - sum_{i<=m} e_i x_i^T delta_i

A token multiplies the factors (a, b, p, c, e) by its gates and adds one write. Its read is u W_t. When a row begins a
chunk, or has no free place, its pending writes are added to its matrices in place (`_settle`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from engrax.pallas_kernels.neural_memory.types import Layers, NeuralMemoryState, with_derivatives

WAITING = 16  # most pending writes; reading more would cost what rarer updates of the matrices save


class Factors(NamedTuple):
    """The factors of W_t and S_t, per row and head; e and c are 0 for places without a write."""

    a: Float[Array, "B H"]
    b: Float[Array, "B H"]
    p: Float[Array, "B H"]
    c: Float[Array, "B H P"]
    e: Float[Array, "B H P"]


class DecodingMemory(NamedTuple):
    """A `NeuralMemoryState` with P places for pending writes.

    keys, deltas: x_i and delta_i of every memory layer, `[B, H, P, I]` and `[B, H, P, O]`. count: pending writes.
    """

    weights: Layers
    momentum: Layers
    anchor: Layers
    phase: Int[Array, " B"]
    keys: Layers
    deltas: Layers
    factors: Factors
    count: Int[Array, " B"]


def open_memory(state: NeuralMemoryState, chunk_size: int) -> DecodingMemory:
    """Returns the state without pending writes."""
    batch, heads = state.weights[0].shape[:2]
    places, dtype = min(chunk_size, WAITING), state.weights[0].dtype
    one, none = jnp.ones((batch, heads), dtype), jnp.zeros((batch, heads, places), dtype)
    return DecodingMemory(
        *(tuple(map(jnp.asarray, layers)) for layers in state[:3]),
        phase=jnp.asarray(state.phase, jnp.int32),
        keys=tuple(jnp.zeros((batch, heads, places, w.shape[2]), dtype) for w in state.weights),
        deltas=tuple(jnp.zeros((batch, heads, places, w.shape[3]), dtype) for w in state.weights),
        factors=Factors(one, 0 * one, one, none, none),
        count=jnp.zeros(batch, jnp.int32),
    )


def close_memory(memory: DecodingMemory) -> NeuralMemoryState:
    """Returns the state with all pending writes added."""
    weights, momentum = _settled(memory)
    return NeuralMemoryState(weights, momentum, memory.anchor, memory.phase)


def decode(
    q: Float[Array, "B 1 H K"],
    k: Float[Array, "B 1 H K"],
    v: Float[Array, "B 1 H V"],
    *,
    lr: Float[Array, "B 1 H"],
    momentum: Float[Array, "B 1 H"],
    forget: Float[Array, "B 1 H"],
    memory: DecodingMemory,
    segment_ids: Int[Array, "B 1"] | None = None,
    activation: str = "gelu",
    chunk_size: int = 64,
) -> tuple[Float[Array, "B 1 H V"], DecodingMemory]:
    """Runs one token of `neural_memory` for every row. Returns (out, memory).

    A padding row (segment id -1) reads 0 and stays unchanged; any other id continues the row's segment.
    """
    f, df, _ = with_derivatives(activation)
    dtype, places = memory.weights[0].dtype, memory.factors.c.shape[-1]
    tokens, real = [x[:, 0] for x in (q, k, v)], jnp.ones(len(q), bool)
    if segment_ids is not None:
        real = segment_ids[:, 0] >= 0
        tokens = [jnp.where(real[:, None, None], x, 0) for x in tokens]  # padding may hold any value
    q_BHK, k_BHK, v_BHV = (x.astype(dtype) for x in tokens)
    memory = _settle(memory, real & ((memory.phase == 0) | (memory.count == places)))
    xs, deltas = _gradient(memory.anchor, k_BHK, v_BHV, f, df)
    place = jnp.where(real, memory.count, places)  # padding: out of range, so its write is dropped
    rows = jnp.arange(len(real))
    keys, held = (
        tuple(old.at[rows, :, place].set(new, mode="drop") for old, new in zip(olds, news))
        for olds, news in ((memory.keys, xs), (memory.deltas, deltas))
    )
    here = (jnp.arange(places) == place[:, None])[:, None]
    factors = _after_token(memory.factors, here, *(gate[:, 0].astype(dtype) for gate in (lr, momentum, forget)))
    factors = jax.tree.map(
        lambda new, old: jnp.where(real.reshape(-1, *[1] * (old.ndim - 1)), new, old), factors, memory.factors
    )
    memory = memory._replace(
        keys=keys,
        deltas=held,
        factors=factors,
        count=memory.count + real,
        phase=jnp.where(real, (memory.phase + 1) % chunk_size, memory.phase),
    )
    out = jnp.where(real[:, None, None], _read(memory, q_BHK, f), 0)
    return out[:, None].astype(v.dtype), memory


def _gradient(anchor: Layers, k, v, f, df) -> tuple[Layers, Layers]:
    """Returns (x_l, delta_l) of every layer: the gradient of 1/2 |M(k) - v|^2 at the anchor is x_l^T delta_l."""
    xs, z = [k], []
    for m in anchor:
        z.append(jnp.einsum("bhi,bhio->bho", xs[-1], m))
        xs.append(f(z[-1]))
    deltas = [z[-1] - v]
    for m, before in zip(anchor[:0:-1], z[-2::-1]):
        deltas.insert(0, jnp.einsum("bho,bhio->bhi", deltas[0], m) * df(before))
    return tuple(xs[:-1]), tuple(deltas)


def _after_token(old: Factors, here: Bool[Array, "B 1 P"], lr, momentum, forget) -> Factors:
    """The factors after a token that writes to the place `here`; gates `[B, H]`."""
    keep = 1 - forget
    p = momentum * old.p
    e = jnp.where(here, lr[..., None], momentum[..., None] * old.e)
    return Factors(keep * old.a, keep * old.b + p, p, keep[..., None] * old.c + e, e)


def _read(memory: DecodingMemory, u: Float[Array, "B H K"], f) -> Float[Array, "B H V"]:
    """M_t(u)."""
    factors = memory.factors
    for layer, (w, s, x, delta) in enumerate(zip(memory.weights, memory.momentum, memory.keys, memory.deltas)):
        u = f(u) if layer else u
        scores = factors.c * jnp.einsum("bhi,bhpi->bhp", u, x)
        kept = factors.a[..., None] * jnp.einsum("bhi,bhio->bho", u, w)
        moved = factors.b[..., None] * jnp.einsum("bhi,bhio->bho", u, s)
        u = kept + moved - jnp.einsum("bhp,bhpo->bho", scores, delta)
    return u


def _settled(memory: DecodingMemory) -> tuple[Layers, Layers]:
    """Weights and momentum with all pending writes added."""
    a, b, p = (factor[..., None, None] for factor in memory.factors[:3])
    weights, momentum = [], []
    for w, s, x, delta in zip(memory.weights, memory.momentum, memory.keys, memory.deltas):
        of_weights, of_momentum = (
            jnp.einsum("bhpi,bhpo->bhio", factor[..., None] * x, delta) for factor in memory.factors[3:]
        )
        weights.append(a * w + b * s - of_weights)
        momentum.append(p * s - of_momentum)
    return tuple(weights), tuple(momentum)


def _settle(memory: DecodingMemory, due: Bool[Array, " B"]) -> DecodingMemory:
    """Adds the pending writes of the rows `due`, row by row and in place; at phase 0, also refreshes the anchor."""
    order = jnp.argsort(~due, stable=True)

    def settle(i, matrices):
        row = memory._replace(**dict(zip(names, matrices)))
        row = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, order[i], 1), row)
        weights, momentum = _settled(row)
        begins = row.phase[:, None, None, None] == 0
        anchor = tuple(jnp.where(begins, w, old) for w, old in zip(weights, row.anchor))
        # Compute everything before any update. Otherwise fusions read a matrix being updated, and XLA copies it.
        new = lax.optimization_barrier((weights, momentum, anchor))
        return jax.tree.map(lambda old, rows: lax.dynamic_update_slice_in_dim(old, rows, order[i], 0), matrices, new)

    names = ("weights", "momentum", "anchor")
    matrices = lax.fori_loop(0, jnp.sum(due), settle, tuple(memory[:3]))
    memory = memory._replace(**dict(zip(names, matrices)))
    start = Factors(*(jnp.asarray(x, memory.factors.a.dtype) for x in (1, 0, 1, 0, 0)))
    factors = jax.tree.map(
        lambda new, old: jnp.where(due.reshape(-1, *[1] * (old.ndim - 1)), new, old), start, memory.factors
    )
    return memory._replace(factors=factors, count=jnp.where(due, 0, memory.count))
