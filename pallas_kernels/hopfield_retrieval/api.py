"""The public operations `hopfield_retrieval` and `hopfield_energy`: contract, validation, choice of implementation."""

import math
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels.common.matmul import accumulator
from engrax.pallas_kernels.common.validation import check_array, check_option, check_positive_int, check_rank
from engrax.pallas_kernels.dispatch import Choice, choose
from engrax.pallas_kernels.hopfield_retrieval.energy import WITH_ENERGY, pull
from engrax.pallas_kernels.hopfield_retrieval.reference import hopfield_retrieval_reference
from engrax.pallas_kernels.hopfield_retrieval.separation import SEPARATIONS
from engrax.pallas_kernels.hopfield_retrieval.similarity import SIMILARITIES, half_square
from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm, RetrievalInputs, RetrievalShapes

OP = "hopfield_retrieval"
GRADIENTS = ("unrolled", "implicit")


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
def hopfield_retrieval(
    state,
    stored,
    values=None,
    *,
    beta,
    steps=1,
    tolerance=1e-4,
    max_steps=64,
    separation="softmax",
    alpha=1.5,
    similarity="dot",
    gradient="unrolled",
    mask=None,
    implementation=None,
):
    """Retrieves from stored patterns (arXiv 2008.02217), independently for each row, head and state:

        xi <- X^T p   (steps - 1 times),   retrieved = V^T p,   p = sep(beta sim(X, xi))

    One update with softmax and "dot" is attention, and runs as `jax.nn.dot_product_attention` for float32 and bfloat16.
    Other dtypes use matrix products, since the library lacks float16 on CPU and has errors of 1e-7 in float64. The
    package hflayers' "update_steps_max = k" corresponds to `steps=k + 1` here.

    Args:
      state: the initial states xi, `[B, N, H, D]`; float64, float32, bfloat16 or float16.
      stored: the patterns X, `[B, M, H, D]`.
      values: `[B, M, H, V]`, read with the last weights; None: the patterns.
      beta: inverse temperature, a number or `[H]`, at least 0 (not checked). 0: all visible patterns have equal weight.
      steps: number of updates, including the last, which reads the values; None: until convergence, decided separately
        for each row, head and state.
      tolerance: with `steps=None`: a state has converged once an update moves it by at most this factor times the norm
        of its longest visible pattern. The iteration of an implicit gradient uses the same tolerance.
      max_steps: with `steps=None`: maximum number of updates.
      separation: "softmax", "sparsemax" (arXiv 1602.02068) or "entmax" (arXiv 1905.05702).
      alpha: of "entmax", above 1; 2 is sparsemax, and the limit 1 is softmax.
      similarity: "dot", "cosine", "l2" (-1/2 |x - xi|^2) or "l1" (-sum |x - xi|).
      gradient: "unrolled": through every update, saving the states between them. "implicit", with `steps=None`: the
        gradient at the converged state, in memory independent of the number of updates; the initial state then gets no
        gradient. The two agree if the iteration has converged.
      mask: bool `[B, M]` or `[B, N, M]`, True = visible; None: all are visible. Invisible patterns may have any value.
        So may a state without visible patterns, which retrieves 0 and gives no gradient.
      implementation: None (choose), "reference" (state by state), "xla", "pallas_gpu" or "pallas_tpu".

    Returns:
      The retrieved vectors, `[B, N, H, V]`, in the widest dtype among state, stored and values.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that cannot serve this call here; the message says why.
    """
    _check_patterns(state, stored, beta, mask)
    if values is not None:
        check_rank("values", values, "[B, M, H, V]")
        check_array("values", values, "[B, M, H, V]", (*stored.shape[:3], values.shape[3]))
    _check_separation(separation, alpha)
    check_option("similarity", similarity, SIMILARITIES)
    check_option("gradient", gradient, GRADIENTS)
    if steps is not None:
        check_positive_int("steps", steps)
    check_positive_int("max_steps", max_steps)
    if not _is_number(tolerance) or not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance!r}, wanted a number of at least 0.")
    if gradient == "implicit" and steps is not None:
        raise ValueError(f"gradient='implicit' is that of a state at rest: it needs steps=None, not steps={steps}.")
    if steps is None and max_steps == 1:
        steps = 1
    dtype = jnp.result_type(state, stored, *(() if values is None else (values,)))
    options = (separation, _power(separation, alpha), similarity, gradient)
    form = RetrievalForm(steps, float(tolerance), int(max_steps), *options, jnp.dtype(dtype))
    (batch, states, heads, key), read = state.shape, stored if values is None else values
    sizes = (batch, heads, states, stored.shape[1], key, read.shape[3])
    shapes = RetrievalShapes(steps, separation, similarity, *sizes, form.operands, getattr(mask, "ndim", 2) == 3)
    choice = choose(OP, shapes, implementation)
    return _run(choice, form._replace(interpret=choice.interpret), state, stored, values, beta, mask)


@no_type_check
def hopfield_energy(state, stored, *, beta, separation="softmax", alpha=1.5, similarity="dot", mask=None):
    """Returns the energy of every state, which no update of `hopfield_retrieval` increases:

        dot   E = 1/2 |xi|^2 - (Omega*(beta X xi) - Omega*(0)) / beta
        l2    E =            - (Omega*(-beta/2 |x - xi|^2) - Omega*(0)) / beta

    Omega* is the conjugate of the separation's entropy. For softmax it is log sum exp, with Omega*(0) = log M, which
    gives the energy of arXiv 2008.02217 up to its constant 1/2 max |x|^2. At beta 0 the result is the limit. For a
    state without visible patterns, it is the expression without Omega*. For "cosine" and "l1", the updates do not
    descend an energy.

    Args: as for `hopfield_retrieval`. Returns `[B, N, H]`, float32 (float64 where an input is).
    Raises ValueError: an argument has a wrong shape, dtype or value; the message names it.
    """
    _check_patterns(state, stored, beta, mask)
    _check_separation(separation, alpha)
    check_option("similarity", similarity, SIMILARITIES)
    if similarity not in WITH_ENERGY:
        raise ValueError(f"similarity {similarity!r} has no energy: its updates are no descent (use 'dot' or 'l2').")
    return _energy(separation, _power(separation, alpha), similarity, state, stored, beta, mask)


@no_type_check
def _check_patterns(state, stored, beta, mask):
    check_rank("state", state, "[B, N, H, D]")
    check_rank("stored", stored, "[B, M, H, D]")
    batch, count, heads, width = state.shape
    check_array("state", state, "[B, N, H, D]", state.shape)
    check_array("stored", stored, "[B, M, H, D]", (batch, stored.shape[1], heads, width))
    if not _is_number(beta):
        if getattr(beta, "ndim", None) not in (0, 1) or not jnp.issubdtype(beta.dtype, jnp.number):
            raise ValueError(f"beta is {beta!r}, wanted a number or an array [H].")
        if beta.ndim == 1:
            check_array("beta", beta, "[H]", (heads,))
    if mask is not None:
        shapes = {2: (batch, stored.shape[1]), 3: (batch, count, stored.shape[1])}
        rank = getattr(mask, "ndim", None)
        if rank not in shapes or tuple(mask.shape) != shapes[rank] or mask.dtype != jnp.bool_:
            what = f"shape {tuple(mask.shape)} and dtype {mask.dtype}" if rank is not None else repr(mask)
            wanted = f"bool [B, M] = {shapes[2]} or [B, N, M] = {shapes[3]}"
            raise ValueError(f"mask has {what}, wanted {wanted}.")


@no_type_check
def _check_separation(separation, alpha):
    check_option("separation", separation, SEPARATIONS)
    if separation == "entmax" and not (_is_number(alpha) and 1 < alpha < math.inf):
        raise ValueError(f"alpha is {alpha!r}, wanted a number above 1 (softmax is its limit at 1).")


def _is_number(x) -> bool:
    return isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)


def _power(separation: str, alpha) -> float:
    """The alpha of the separation's entropy."""
    return {"softmax": 1.0, "sparsemax": 2.0}.get(separation) or float(alpha)


def _prepare(dtype, state, stored, values, beta, mask):
    """Gives beta a value per head, the mask three axes, and zeros to hidden patterns and to states that see none."""
    beta = jnp.broadcast_to(jnp.asarray(beta, accumulator(dtype)), state.shape[2:3])
    if mask is not None:
        mask = mask[:, None] if mask.ndim == 2 else mask
        seen = jnp.any(mask, axis=1)[..., None, None]
        stored, values = (None if x is None else jnp.where(seen, x, 0) for x in (stored, values))
        state = jnp.where(jnp.any(mask, axis=-1)[..., None, None], state, 0)
    return state.astype(dtype), stored.astype(dtype), stored if values is None else values, beta, mask


@partial(jax.jit, static_argnums=(0, 1))
def _run(choice: Choice, form, state, stored, values, beta, mask):
    dtype = form.operands
    state, stored, values, beta, mask = _prepare(dtype, state, stored, values, beta, mask)
    plain = form.steps == 1 and form.separation == "softmax" and form.similarity == "dot"
    if not choice.reference and plain and dtype in (jnp.float32, jnp.bfloat16):
        return _attention(state, stored, values.astype(dtype), beta, mask)
    wide = accumulator(dtype)
    arrays = [jnp.swapaxes(x, 1, 2) for x in (state, stored, values)]
    if choice.reference:
        visible = jnp.ones((1, 1, 1), bool) if mask is None else mask
        visible = jnp.broadcast_to(visible, (*state.shape[:2], stored.shape[1]))
        out = hopfield_retrieval_reference(form, *(x.astype(wide) for x in arrays), beta, visible)
    else:
        out = choice.run(form, RetrievalInputs(*arrays, beta, mask))
    return jnp.swapaxes(out, 1, 2).astype(dtype)


def _attention(state, stored, values, beta, mask):
    """One update with softmax and dot products, through the library's attention."""
    width, value = state.shape[3], values.shape[3]
    state = (state.astype(beta.dtype) * beta[:, None]).astype(state.dtype)
    state, stored = (_widened(x, value) for x in (state, stored))
    shown = None if mask is None else mask[:, None]
    out = jax.nn.dot_product_attention(state, stored, _widened(values, width), mask=shown, scale=1.0)[..., :value]
    # For a state without visible patterns the library returns the mean of the hidden ones.
    return out if mask is None else jnp.where(jnp.any(mask, axis=-1)[..., None, None], out, 0)


def _widened(x, width):
    """The library requires queries, keys and values of equal width."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, max(width - x.shape[3], 0))])


@partial(jax.jit, static_argnums=(0, 1, 2))
def _energy(separation, alpha, similarity, state, stored, beta, mask):
    dtype = accumulator(jnp.result_type(state, stored))
    own = half_square(state.astype(dtype)) if similarity == "dot" else 0  # also for a state that sees nothing
    state, stored, _, beta, mask = _prepare(dtype, state, stored, None, beta, mask)
    arrays = [jnp.swapaxes(x, 1, 2) for x in (state, stored)]
    return own - jnp.swapaxes(pull(separation, alpha, similarity, *arrays, beta, mask), 1, 2)
