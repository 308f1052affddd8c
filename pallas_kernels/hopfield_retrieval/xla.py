"""Hopfield retrieval with matrix products, a bounded loop, and backward passes that save states, never weights.

All updates but the last map state to state, f(xi) = X^T sep(beta sim(X, xi)). The last update reads the values. Each
state of each row and head has its own step count: a converged state stays fixed while others move. Gradients through
the updates save the states `[steps, B, H, N, D]` and recompute the weights of each step. The implicit gradient saves
only the converged state. It iterates u = xi_bar + J^T u like the state, with J the Jacobian of f there, and pulls u
back through one update. (The converged state does not depend on the initial state.)
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.matmul import accumulator, emulated_on_cpu
from engrax.pallas_kernels.hopfield_retrieval.separation import exponentials, separate
from engrax.pallas_kernels.hopfield_retrieval.similarity import product, similarities
from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm, RetrievalInputs, Sight
from engrax.pallas_kernels.hopfield_retrieval.visibility import visible
from engrax.pallas_kernels.passes import Passes

CACHED_SCORES = 2**19  # 2 MiB
UNROLLED = 8  # updates to unroll: a loop copies its states


def hopfield_retrieval_xla(
    form: RetrievalForm,
    state: Float[Array, "B H N D"],
    stored: Float[Array, "B H M D"],
    values: Float[Array, "B H M V"],
    beta: Float[Array, " H"],
    sight: Sight,
) -> Float[Array, "B H N V"]:
    """Returns every state's retrieved vector in the accumulator's dtype; the sight is resolved."""
    on_a_cpu = form._replace(operands=emulated_on_cpu(form.operands), scores=CACHED_SCORES)
    branches = {"cpu": partial(_by_blocks, on_a_cpu), "default": partial(_by_blocks, form)}
    return lax.platform_dependent(state, stored, values, beta, sight, **branches)


def _retrieve_all(form: RetrievalForm, inputs: RetrievalInputs) -> Float[Array, "B H N V"]:
    return hopfield_retrieval_xla(form, *inputs)


passes = Passes.of(_retrieve_all)


def _by_blocks(form, state, stored, values, beta, sight):
    """Runs all updates of one block of states, then of the next, so that scores stay in the cache between steps."""
    batch, heads, count, _ = state.shape
    blocks = 1
    if form.scores is not None and form.steps != 1:
        blocks = -(-batch * heads * count * stored.shape[2] // form.scores)
    size = -(-count // min(blocks, count))
    blocks = -(-count // size)
    if blocks == 1:
        return _retrieve(form, state, stored, values, beta, sight)

    def split(x, axis):  # pads the last block with copies of the last state, which take no further update
        pad = [(0, blocks * size - count if i == axis else 0) for i in range(x.ndim)]
        x = jnp.pad(x, pad, mode="edge")
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def run(block):
        state, of_states = block
        return _retrieve(form, state, stored, values, beta, sight._replace(**of_states))

    axes = {"segments": 1, "place": 0} | ({} if sight.mask is None or sight.mask.shape[1] == 1 else {"mask": 1})
    of_states = {name: getattr(sight, name) for name in axes}
    of_states = {name: None if x is None else split(x, axes[name]) for name, x in of_states.items()}
    out = lax.map(run, (split(state, 2), of_states))
    return jnp.moveaxis(out, 0, 2).reshape(batch, heads, blocks * size, -1)[:, :, :count]


def _retrieve(form, state, stored, values, beta, sight):
    dtype = accumulator(state.dtype)  # of states between updates, and of the sums of gradients over updates
    state, stored = state.astype(dtype), stored.astype(dtype)
    if form.steps is None:
        rest = _unrolled if form.gradient == "unrolled" else _implicit
        state = rest(form, state, stored, beta, sight)
    else:
        step = jax.checkpoint(lambda state, _: (_update(form, state, stored, beta, sight), None))
        state = lax.scan(step, state, length=form.steps - 1, unroll=UNROLLED)[0] if form.steps > 1 else state
    return _read(form, state, stored, values, beta, sight)


def _scores(form, state, stored, beta):
    if form.similarity == "dot" and form.operands in (jnp.float32, jnp.float64):
        # There are fewer states than scores. An operand of 16 bits would be rounded once more.
        return similarities("dot", beta * state, stored, form.operands)
    return beta * similarities(form.similarity, state, stored, form.operands)


def _read(form, state, stored, values, beta, sight):
    """One update that averages `values`; softmax is normalised last, where there are fewer numbers."""
    scores = _scores(form, state, stored, beta[:, None, None])
    shown = _shown(form, stored, sight)
    if form.separation == "softmax":
        weights, total = exponentials(scores, shown)
        return product("bhnm,bhmv->bhnv", weights, values, form.operands) / total
    weights = separate(form.separation, form.alpha, scores, shown)
    return product("bhnm,bhmv->bhnv", weights, values, form.operands)


def _shown(form, stored, sight):
    """The visible pairs [B or 1, 1, N or 1, M]. Each use makes them anew, so that no [B, N, M] need be kept."""
    shown = visible(form.reach, sight, stored.shape[2])
    return None if shown is None else shown[:, None]


def _update(form, state, stored, beta, sight):
    return _read(form, state, stored, stored, beta, sight)


def _length(x):
    return jnp.sqrt(jnp.sum(x * x, axis=-1))


def _iterate(step, start, nearest, max_steps, keep=False):
    """Iterates every vector of the last axis until it moves by at most `nearest`, at most `max_steps` times.

    Returns (final vectors, number of steps of each, and with `keep` the vectors before each step).
    """
    past = jnp.zeros((max_steps, *start.shape), start.dtype) if keep else None

    def moving(carry):
        i, _, count, _ = carry
        return (i < max_steps) & jnp.any(count == i)

    def body(carry):
        i, x, count, past = carry
        new = step(x)
        moves = count == i  # it has taken every step so far
        goes_on = moves & ~(_length(new - x) <= nearest)
        past = past.at[i].set(x) if keep else None
        # After a vector's last step, its count stays behind the loop's: that makes i + 1 steps, added at the end.
        return i + 1, jnp.where(moves[..., None], new, x), jnp.where(goes_on, i + 1, count), past

    zero = jnp.zeros(start.shape[:-1], jnp.int32)
    i, x, count, past = lax.while_loop(moving, body, (jnp.int32(0), start, zero, past))
    return x, jnp.minimum(count + 1, i), past


def _nearest(form, stored, sight):
    length, shown = _length(stored.astype(accumulator(stored.dtype)))[:, :, None], _shown(form, stored, sight)
    return form.tolerance * jnp.max(length if shown is None else jnp.where(shown, length, 0), axis=-1)


def _rest(form, state, stored, beta, sight, keep=False):
    step = partial(_update, form, stored=stored, beta=beta, sight=sight)
    return _iterate(step, state, _nearest(form, stored, sight), form.max_steps - 1, keep)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unrolled(form, state, stored, beta, sight):
    return _rest(form, state, stored, beta, sight)[0]


def _unrolled_fwd(form, state, stored, beta, sight):
    state, count, past = _rest(form, state, stored, beta, sight, keep=True)
    return state, (past, count, stored, beta, sight)


def _unrolled_bwd(form, saved, bar):
    past, count, stored, beta, sight = saved

    def body(carry):
        i, bar, stored_bar, beta_bar = carry
        took = (i < count)[..., None]
        pull = jax.vjp(lambda *args: _update(form, *args, sight), past[i], stored, beta)[1]
        before, of_stored, of_beta = pull(jnp.where(took, bar, 0))
        return i - 1, jnp.where(took, before, bar), stored_bar + of_stored, beta_bar + of_beta

    start = (jnp.max(count) - 1, bar, jnp.zeros_like(stored), jnp.zeros_like(beta))
    _, bar, stored_bar, beta_bar = lax.while_loop(lambda carry: carry[0] >= 0, body, start)
    return bar, stored_bar, beta_bar, None


_unrolled.defvjp(_unrolled_fwd, _unrolled_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _implicit(form, state, stored, beta, sight):
    return _rest(form, state, stored, beta, sight)[0]


def _implicit_fwd(form, state, stored, beta, sight):
    state = _rest(form, state, stored, beta, sight)[0]
    return state, (state, stored, beta, sight)


def _implicit_bwd(form, saved, bar):
    state, stored, beta, sight = saved
    by_state = jax.vjp(lambda state: _update(form, state, stored, beta, sight), state)[1]
    u, _, _ = _iterate(lambda u: bar + by_state(u)[0], bar, form.tolerance * _length(bar), form.max_steps)
    by_rest = jax.vjp(lambda stored, beta: _update(form, state, stored, beta, sight), stored, beta)[1]
    return jnp.zeros_like(state), *by_rest(u), None


_implicit.defvjp(_implicit_fwd, _implicit_bwd)
