"""The public operation `neural_memory`: contract, validation and choice of an implementation."""

from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels.common.validation import check_array, check_option, check_positive_int, check_rank
from engrax.pallas_kernels.dispatch import choose
from engrax.pallas_kernels.neural_memory.reference import neural_memory_reference
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS, GRADIENT_AT, OP, MemoryShapes, NeuralMemoryState
from engrax.pallas_kernels.neural_memory.vjp import group_size
from engrax.pallas_kernels.neural_memory.xla import neural_memory_xla


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
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
    """Writes every token into an MLP memory, by gradient descent with momentum and forgetting, and reads from it.

    The memory of each row and head is M(x) = act(... act(x W_1) ...) W_L. The gradient of token t's inner loss is taken
    at the anchor, the memory at the start of t's chunk (Titans, arXiv:2501.00663, equations 12 to 18):

        grad_t = d/dW 1/2 ||M_anchor(k_t) - v_t||^2
        S_t = momentum_t S_{t-1} - lr_t grad_t
        W_t = (1 - forget_t) W_{t-1} + S_t
        out_t = M_t(q_t)

    Args:
      q, k: queries and keys `[B, T, H, K]`, any T >= 1; float64, float32, bfloat16 or float16.
      v: values `[B, T, H, V]`, the targets of the inner loss.
      lr: step size `[B, T, H]`, >= 0 (not checked).
      momentum, forget: `[B, T, H]` in [0, 1], exact 0 and 1 included (not checked).
      state: `NeuralMemoryState` to continue from. If the phase is known to be zero, give it as a NumPy array of zeros
        (as `NeuralMemoryState.start` does): unknown phases cost one extra block.
      reset: `(weights, momentum)`, tuples with one `[H, I, O]` array per memory layer: the start of every segment
        except a row's first; required with `segment_ids`.
      segment_ids: int `[B, T]`, -1 = padding after a row's last token, -2 = filler between segments. Neither writes or
        decays anything, and both read 0. Filler counts as a position of its chunk; padding does not. A row's first
        segment continues `state`. Later segments start from `reset`, and their anchor is the reset memory until the
        row's next chunk begins. The final state is the state after the last real token.
      activation: "gelu" (tanh approximation), "silu", "relu" or "tanh".
      gradient_at: "anchor", or "decayed" for the gradient at (1 - forget_t) times the anchor.
      chunk_size: tokens between two refreshes of the anchor.
      save_every: controls the peak memory of the backward pass. n > 1: saves the state of every n-th chunk and
        recomputes the chunks between. 1: saves the hidden rows of every chunk, and the state of every chunk of 64
        tokens or more (one state per up to four shorter chunks). The GPU kernels always recompute everything.
      implementation: None (choose), "reference" (token by token), "xla" (dual form, chunk by chunk), or a kernel, see
        `engrax.pallas_kernels.available`. The GPU kernels serve bfloat16 q, k and v only. They round all operands of
        products, including the state, to bfloat16, and accumulate in float32.

    Returns:
      out `[B, T, H, V]` in v's dtype, and the final `NeuralMemoryState`, float32 (float64 if any input is).

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that cannot serve this call here; the message says why.
    """
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
    tokens = jnp.result_type(q, k, v)
    shapes = _shapes(q, state, dtype, tokens, int(chunk_size), int(save_every), aligned, segment_ids is not None)
    choice = choose(OP, shapes, implementation)
    if choice.reference:
        out, state = _reference(*args, **options)
    else:
        more = dict(save_every=int(save_every), aligned=aligned, choice=choice)
        out, state = _by_chunks(*args, **options, **more)
    return out.astype(v.dtype), state


_reference = partial(jax.jit, static_argnames=("activation", "gradient_at", "chunk_size"))(neural_memory_reference)
_OPTIONS = ("activation", "gradient_at", "chunk_size", "save_every", "aligned", "choice")
_by_chunks = partial(jax.jit, static_argnames=_OPTIONS)(neural_memory_xla)


def _shapes(q, state, dtype, tokens, chunk_size: int, save_every: int, aligned: bool, segments: bool) -> MemoryShapes:
    """Returns the shapes that a kernel would have to serve."""
    batch, length, heads = q.shape[:3]
    slots = min(length, chunk_size)
    blocks = -(-length // slots) + (not aligned and length > 1)
    layers = tuple(w.shape[2:] for w in state.weights)
    group = group_size(blocks, slots, save_every)
    return MemoryShapes(
        jnp.dtype(dtype), layers, slots, group, jnp.dtype(tokens), batch, heads, blocks, aligned, segments
    )


@no_type_check
def _validate_tokens(q, k, v, lr, momentum, forget, segment_ids):
    check_rank("q", q, "[B, T, H, K]")
    check_rank("v", v, "[B, T, H, V]")
    check_array("q", q, "[B, T, H, K]", q.shape)
    check_array("k", k, "[B, T, H, K]", q.shape)
    check_array("v", v, "[B, T, H, V]", (*q.shape[:3], v.shape[3]))
    for name, x in (("lr", lr), ("momentum", momentum), ("forget", forget)):
        check_array(name, x, "[B, T, H]", q.shape[:3])
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "[B, T]", q.shape[:2], jnp.integer)


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
        check_array(f"state.weights[{layer}]", w, letters, (batch, heads, features, out))
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
            check_array(
                f"{name}[{layer}]", m, "[H, I, O]" if of_reset else "[B, H, I, O]", shape[1:] if of_reset else shape
            )
    check_array("state.phase", state.phase, "[B]", (batch,), jnp.integer)


@no_type_check
def _validate_options(activation, gradient_at, chunk_size, save_every, reset, segment_ids):
    check_option("activation", activation, ACTIVATIONS)
    check_option("gradient_at", gradient_at, GRADIENT_AT)
    check_positive_int("chunk_size", chunk_size)
    check_positive_int("save_every", save_every)
    if segment_ids is not None and reset is None:
        raise ValueError("segment_ids needs reset, the pair (weights, momentum) that every new segment starts from.")
