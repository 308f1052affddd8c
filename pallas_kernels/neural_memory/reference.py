"""The neural memory by its definition: token by token, with inner gradients by `jax.grad`. A slow oracle."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from engrax.pallas_kernels.common.segments import row_lengths
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS, Layers, NeuralMemoryState

Tree = jax.tree_util


def read_memory(weights: Layers, x: Float[Array, " K"], activation: str) -> Float[Array, " V"]:
    """Returns M(x) = act(... act(x W_1) ...) W_L for one head and one token."""
    *hidden, last = weights
    for w in hidden:
        x = ACTIVATIONS[activation](x @ w)
    return x @ last


def surprise(weights: Layers, k: Float[Array, " K"], v: Float[Array, " V"], activation: str) -> Layers:
    """Returns the gradient of 1/2 ||M(k) - v||^2 with respect to the weights, for one head and one token."""

    def loss(weights):
        error = read_memory(weights, k, activation) - v
        return 0.5 * jnp.sum(error * error)

    return jax.grad(loss)(weights)


def _update_head(weights, momentum, anchor, k, v, lr, mom, forget, *, activation, gradient_at):
    """Returns (weights, momentum) of one head after one token's write; lr, mom and forget are scalars."""
    if gradient_at == "decayed":
        anchor = tuple((1 - forget) * w for w in anchor)
    gradient = surprise(anchor, k, v, activation)
    momentum = tuple(mom * s - lr * g for s, g in zip(momentum, gradient))
    weights = tuple((1 - forget) * w + s for w, s in zip(weights, momentum))
    return weights, momentum


def neural_memory_reference(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    lr: Float[Array, "B T H"],
    momentum: Float[Array, "B T H"],
    forget: Float[Array, "B T H"],
    state: NeuralMemoryState,
    reset: tuple[Layers, Layers] | None,
    segment_ids: Int[Array, "B T"] | None,
    *,
    activation: str,
    gradient_at: str,
    chunk_size: int,
) -> tuple[Float[Array, "B T H V"], NeuralMemoryState]:
    """Runs the recurrence of `neural_memory` token by token; all arrays in the dtype of the computation."""
    batch = q.shape[0]
    ids = jnp.zeros(q.shape[:2], jnp.int32) if segment_ids is None else segment_ids
    counts = jnp.arange(q.shape[1])[:, None] < row_lengths(ids)  # padding does not count in a chunk

    def update_head(*args):
        return _update_head(*args, activation=activation, gradient_at=gradient_at)

    update = jax.vmap(jax.vmap(update_head))
    read = jax.vmap(jax.vmap(lambda weights, x: read_memory(weights, x, activation)))

    def choose(condition, new, old):  # by row
        return Tree.tree_map(lambda a, b: jnp.where(condition[:, None, None, None], a, b), new, old)

    def token(carry, inputs):
        (weights, mom_state, anchor, phase), last_id = carry
        q_t, k_t, v_t, lr_t, mom_t, forget_t, id_t, counts_t = inputs
        real = id_t >= 0
        q_t, k_t, v_t = (jnp.where(real[:, None, None], x, 0) for x in (q_t, k_t, v_t))  # padding may hold any value
        if reset is not None:
            starts = real & (last_id >= 0) & (id_t != last_id)
            weights, mom_state, anchor = choose(starts, (*reset, reset[0]), (weights, mom_state, anchor))
        anchor = choose((phase == 0) & counts_t, weights, anchor)
        written = update(weights, mom_state, anchor, k_t, v_t, lr_t, mom_t, forget_t)
        weights, mom_state = choose(real, written, (weights, mom_state))
        out = jnp.where(real[:, None, None], read(weights, q_t), 0)
        last_id = jnp.where(real, id_t, last_id)
        return (NeuralMemoryState(weights, mom_state, anchor, (phase + counts_t) % chunk_size), last_id), out

    state = state._replace(phase=jnp.asarray(state.phase, jnp.int32))
    inputs = (*(jnp.moveaxis(x, 1, 0) for x in (q, k, v, lr, momentum, forget, ids)), counts)
    (state, _), out = jax.lax.scan(token, (state, jnp.full(batch, -1, ids.dtype)), inputs)
    return jnp.moveaxis(out, 0, 1), state
