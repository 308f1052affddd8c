"""The public operation `neural_memory`: its contract, its validation and the choice of an implementation."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels.neural_memory import IMPLEMENTATIONS, MISSING
from engrax.pallas_kernels.neural_memory.reference import neural_memory_reference
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS, GRADIENT_AT, NeuralMemoryState
from engrax.pallas_kernels.neural_memory.xla import neural_memory_xla
from engrax.registry import did_you_mean


@no_type_check  # its own messages name the argument and the shape wanted; what it calls is checked
def neural_memory(
    q,
    k,
    v,
    *,
    lr,
    momentum,
    forget,
    state,
    reset=None,
    segment_ids=None,
    activation="gelu",
    gradient_at="anchor",
    chunk_size=64,
    save_every=1,
    implementation=None,
):
    """Writes every token into a memory that is an MLP, by gradient descent with momentum and forgetting, and reads it.

    For every row and head, with M(x) = act(... act(x W_1) ...) W_L and token t's gradient of the inner loss taken at
    the anchor, the memory as it stood at the start of t's chunk (Titans, arXiv:2501.00663, equations 12 to 18):

        grad_t = d/dW 1/2 ||M_anchor(k_t) - v_t||^2
        S_t = momentum_t S_{t-1} - lr_t grad_t
        W_t = (1 - forget_t) W_{t-1} + S_t
        out_t = M_t(q_t)

    Args:
      q, k: queries and keys `[B, T, H, K]`, any T >= 1; float64, float32, bfloat16 or float16.
      v: values `[B, T, H, V]`, the targets of the inner loss.
      lr: step size `[B, T, H]`, >= 0 (not checked).
      momentum, forget: `[B, T, H]` in [0, 1], exact 0 and 1 included (not checked).
      state: `NeuralMemoryState` to continue from. Give its phase as a NumPy array of zeros (as
        `NeuralMemoryState.start` does) where it is known to be zero: rows at unknown phases cost one block more.
      reset: `(weights, momentum)`, tuples with one `[H, I, O]` array per memory layer, what every segment but a row's
        first starts from; required with `segment_ids`.
      segment_ids: int `[B, T]`, -1 = padding. Padding writes nothing, decays nothing and reads 0, but it takes a place
        in its chunk. The row's first segment continues `state`; a later one starts from `reset`, and its anchor is the
        reset memory until the row's next chunk begins. The final state is that after the last real token.
      activation: "gelu" (tanh form), "silu", "relu" or "tanh".
      gradient_at: "anchor", or "decayed": the gradient is taken at (1 - forget_t) times the anchor.
      chunk_size: tokens between two refreshes of the anchor.
      save_every: peak memory of the backward pass. n > 1: it keeps the state of every n-th chunk and runs the chunks
        between again. 1: it keeps the hidden rows of every chunk, and the state of every chunk of 64 tokens or more (of
        shorter chunks up to every fourth).
      implementation: None (choose), "reference" (token by token) or "xla" (dual form, chunk by chunk).

    Returns:
      out `[B, T, H, V]` in v's dtype, and the final `NeuralMemoryState`, float32 (float64 if any input is).

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that this version does not have.
    """
    name = _choose(implementation)
    state = NeuralMemoryState(tuple(state[0]), tuple(state[1]), tuple(state[2]), state[3])
    _validate_tokens(q, k, v, lr, momentum, forget, segment_ids)
    _validate_state(q, v, state, reset)
    _validate_options(activation, gradient_at, chunk_size, save_every, reset, segment_ids)
    aligned = not isinstance(state.phase, jax.Array) and not np.any(state.phase)
    floats = (q, k, v, lr, momentum, forget, state[:3], reset)
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(floats))
    q_, k_, v_, lr, momentum, forget, matrices, reset = jax.tree.map(lambda x: jnp.asarray(x, dtype), floats)
    phase = jnp.asarray(state.phase, jnp.int32)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    args = (q_, k_, v_, lr, momentum, forget, NeuralMemoryState(*matrices, phase), reset, segment_ids)
    options = dict(activation=activation, gradient_at=gradient_at, chunk_size=int(chunk_size))
    if name == "xla":
        out, state = _xla(*args, **options, save_every=int(save_every), aligned=aligned)
    else:
        out, state = _reference(*args, **options)
    return out.astype(v.dtype), state


_reference = partial(jax.jit, static_argnames=("activation", "gradient_at", "chunk_size"))(neural_memory_reference)
_xla = partial(jax.jit, static_argnames=("activation", "gradient_at", "chunk_size", "save_every", "aligned"))(
    neural_memory_xla
)


def _choose(implementation: str | None) -> str:
    if implementation is None:
        return "xla"
    if implementation in MISSING:
        raise NotImplementedError(f"{implementation!r} cannot run: {MISSING[implementation]}; use 'xla' or None.")
    if implementation not in IMPLEMENTATIONS:
        known = (*IMPLEMENTATIONS, *MISSING)
        near = did_you_mean(str(implementation), known)
        raise ValueError(f"unknown implementation {implementation!r}{near} (known: {', '.join(known)}).")
    return implementation


@no_type_check
def _check(name, x, wanted, shape, kind=jnp.floating):
    """Raises ValueError unless array x has the shape; `wanted` is the shape in letters, for the message."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array of shape {wanted}, got {type(x).__name__}.")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, wanted {wanted} = {tuple(shape)}.")
    if not jnp.issubdtype(x.dtype, kind):
        family = "a floating-point" if kind is jnp.floating else "an integer"
        raise ValueError(f"{name} has dtype {x.dtype}, wanted {family} dtype.")


@no_type_check
def _validate_tokens(q, k, v, lr, momentum, forget, segment_ids):
    for name, x in (("q", q), ("v", v)):
        if getattr(x, "ndim", None) != 4 or 0 in x.shape:
            letters = "[B, T, H, V]" if name == "v" else "[B, T, H, K]"
            raise ValueError(f"{name} has shape {getattr(x, 'shape', None)}, wanted {letters}, every axis at least 1.")
    _check("q", q, "[B, T, H, K]", q.shape)
    _check("k", k, "[B, T, H, K]", q.shape)
    _check("v", v, "[B, T, H, V]", (*q.shape[:3], v.shape[3]))
    for name, x in (("lr", lr), ("momentum", momentum), ("forget", forget)):
        _check(name, x, "[B, T, H]", q.shape[:3])
    if segment_ids is not None:
        _check("segment_ids", segment_ids, "[B, T]", q.shape[:2], jnp.integer)


@no_type_check
def _validate_state(q, v, state, reset):
    batch, _, heads, features = q.shape
    if not state.weights:
        raise ValueError("state.weights is empty, wanted one [B, H, I, O] array per memory layer.")
    shapes = []
    for layer, w in enumerate(state.weights):
        last = layer == len(state.weights) - 1
        out = v.shape[3] if last else (w.shape[3] if getattr(w, "ndim", None) == 4 else "O")
        letters = f"[B, H, {'K' if layer == 0 else 'I'}, {'V' if last else 'O'}]"
        _check(f"state.weights[{layer}]", w, letters, (batch, heads, features, out))
        shapes.append(w.shape)
        features = out
    rest = [("state.momentum", state.momentum), ("state.anchor", state.anchor)]
    if reset is not None:
        if not isinstance(reset, (tuple, list)) or len(reset) != 2:
            raise ValueError("reset must be a pair (weights, momentum) of tuples of [H, I, O] arrays.")
        rest += [("reset weights", reset[0]), ("reset momentum", reset[1])]
    for name, layers in rest:
        if len(layers) != len(shapes):
            raise ValueError(f"{name} has {len(layers)} layers, wanted {len(shapes)} as state.weights.")
        for layer, (m, shape) in enumerate(zip(layers, shapes)):
            of_reset = name.startswith("reset")
            _check(f"{name}[{layer}]", m, "[H, I, O]" if of_reset else "[B, H, I, O]", shape[1:] if of_reset else shape)
    _check("state.phase", state.phase, "[B]", (batch,), jnp.integer)


@no_type_check
def _validate_options(activation, gradient_at, chunk_size, save_every, reset, segment_ids):
    for name, value, known in (("activation", activation, ACTIVATIONS), ("gradient_at", gradient_at, GRADIENT_AT)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}{did_you_mean(str(value), known)} (known: {', '.join(known)}).")
    for name, value in (("chunk_size", chunk_size), ("save_every", save_every)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise ValueError(f"{name} is {value!r}, wanted an integer of at least 1.")
    if segment_ids is not None and reset is None:
        raise ValueError("segment_ids needs reset, the pair (weights, momentum) that every new segment starts from.")
