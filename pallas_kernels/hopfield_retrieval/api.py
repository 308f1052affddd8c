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
from engrax.pallas_kernels.hopfield_retrieval.types import Reach, RetrievalForm, RetrievalInputs, RetrievalShapes, Sight
from engrax.pallas_kernels.hopfield_retrieval.visibility import resolve, sees_and_seen, visible

OP = "hopfield_retrieval"
GRADIENTS = ("unrolled", "implicit")


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
def hopfield_retrieval(
    state,
    stored,
    values=None,
    *,
    beta,
    causal=False,
    window=None,
    segment_ids=None,
    stored_segment_ids=None,
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
      causal: whether state n sees pattern m only if m <= n + (M - N): the last state stands at the last pattern, and
        M - N patterns are before the first state, such as those of earlier calls.
      window: how far back a state sees: pattern m only if n + (M - N) - m < window; None: all.
      segment_ids: int `[B, N]`, of the states: a state sees only patterns with its own id. States and patterns with
        negative ids (padding) see nothing and are seen by none. None: all see each other.
      stored_segment_ids: int `[B, M]`, of the patterns; None: those of the states, and then M is N.
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
      mask: bool `[B, M]` or `[B, N, M]`, True = visible, instead of the four arguments above; `[B, N, M]` is served by
        no kernel. Patterns that no state sees may have any value. So may a state without visible patterns, which
        retrieves 0 and gives no gradient.
      implementation: None (choose), "reference" (state by state), "xla", "pallas_gpu" or "pallas_tpu".

    Returns:
      The retrieved vectors, `[B, N, H, V]`, in the widest dtype among state, stored and values.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that cannot serve this call here; the message says why.
    """
    _check_patterns(state, stored, beta)
    _check_sight(state, stored, causal, window, segment_ids, stored_segment_ids, mask)
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
    reach = Reach(bool(causal), None if window is None else int(window))
    form = RetrievalForm(steps, float(tolerance), int(max_steps), *options, jnp.dtype(dtype), reach)
    (batch, states, heads, key), read = state.shape, stored if values is None else values
    sizes = (batch, heads, states, stored.shape[1], key, read.shape[3])
    seen_by = segment_ids is not None, getattr(mask, "ndim", 2) == 3
    shapes = RetrievalShapes(steps, separation, similarity, *sizes, form.operands, *reach, *seen_by)
    choice = choose(OP, shapes, implementation)
    sight = Sight(mask, segment_ids, stored_segment_ids)
    return _run(choice, form._replace(interpret=choice.interpret), state, stored, values, beta, sight)


@no_type_check
def hopfield_energy(
    state,
    stored,
    *,
    beta,
    causal=False,
    window=None,
    segment_ids=None,
    stored_segment_ids=None,
    separation="softmax",
    alpha=1.5,
    similarity="dot",
    mask=None,
):
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
    _check_patterns(state, stored, beta)
    _check_sight(state, stored, causal, window, segment_ids, stored_segment_ids, mask)
    _check_separation(separation, alpha)
    check_option("similarity", similarity, SIMILARITIES)
    if similarity not in WITH_ENERGY:
        raise ValueError(f"similarity {similarity!r} has no energy: its updates are no descent (use 'dot' or 'l2').")
    separated = separation, _power(separation, alpha), similarity
    sight = Sight(mask, segment_ids, stored_segment_ids)
    reach = Reach(bool(causal), None if window is None else int(window))
    return _energy(separated, reach, state, stored, beta, sight)


@no_type_check
def _check_patterns(state, stored, beta):
    check_rank("state", state, "[B, N, H, D]")
    check_rank("stored", stored, "[B, M, H, D]")
    batch, _, heads, width = state.shape
    check_array("state", state, "[B, N, H, D]", state.shape)
    check_array("stored", stored, "[B, M, H, D]", (batch, stored.shape[1], heads, width))
    if not _is_number(beta):
        if getattr(beta, "ndim", None) not in (0, 1) or not jnp.issubdtype(beta.dtype, jnp.number):
            raise ValueError(f"beta is {beta!r}, wanted a number or an array [H].")
        if beta.ndim == 1:
            check_array("beta", beta, "[H]", (heads,))


@no_type_check
def _check_sight(state, stored, causal, window, segment_ids, stored_segment_ids, mask):
    (batch, count), patterns = state.shape[:2], stored.shape[1]
    if not isinstance(causal, (bool, np.bool_)):
        raise ValueError(f"causal is {causal!r}, wanted True or False.")
    if window is not None:
        check_positive_int("window", window)
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "[B, N]", (batch, count), jnp.integer)
    if stored_segment_ids is not None:
        if segment_ids is None:
            raise ValueError("stored_segment_ids needs segment_ids, the segment of every state.")
        check_array("stored_segment_ids", stored_segment_ids, "[B, M]", (batch, patterns), jnp.integer)
    elif segment_ids is not None and count != patterns:
        of_both = f"segment_ids has shape {(batch, count)}, of {count} states for {patterns} patterns"
        raise ValueError(f"{of_both}: give the patterns' as well, stored_segment_ids [B, M] = {(batch, patterns)}.")
    if mask is not None:
        if causal or any(x is not None for x in (window, segment_ids)):
            others = "causal, window, segment_ids and stored_segment_ids"
            raise ValueError(f"mask says all of what the states see: leave out {others}, or leave out mask.")
        shapes = {2: (batch, patterns), 3: (batch, count, patterns)}
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


def _prepare(dtype, reach, state, stored, values, beta, given):
    """Gives beta a value per head, and zeros to patterns that no state sees and to states that see none.

    Returns all arrays, the resolved sight, and which states see a pattern (None: all).
    """
    beta = jnp.broadcast_to(jnp.asarray(beta, accumulator(dtype)), state.shape[2:3])
    if given.mask is not None and given.mask.ndim == 2:
        given = given._replace(mask=given.mask[:, None])
    sight = resolve(reach, given, state.shape[1], stored.shape[1])
    sees, seen = sees_and_seen(reach, given, sight, state.shape[1], stored.shape[1])
    if seen is not None:
        stored, values = (None if x is None else jnp.where(seen[..., None, None], x, 0) for x in (stored, values))
        state = jnp.where(sees[..., None, None], state, 0)
    return state.astype(dtype), stored.astype(dtype), stored if values is None else values, beta, sight, sees


@partial(jax.jit, static_argnums=(0, 1))
def _run(choice: Choice, form, state, stored, values, beta, given):
    dtype = form.operands
    state, stored, values, beta, sight, sees = _prepare(dtype, form.reach, state, stored, values, beta, given)
    plain = form.steps == 1 and form.separation == "softmax" and form.similarity == "dot"
    if not choice.reference and plain and dtype in (jnp.float32, jnp.bfloat16):
        out = _attention(form.reach, state, stored, values.astype(dtype), beta, sight)
        # For a state without visible patterns the library returns the mean of the hidden ones.
        return out if sees is None else jnp.where(sees[..., None, None], out, 0)
    wide = accumulator(dtype)
    arrays = [jnp.swapaxes(x, 1, 2) for x in (state, stored, values)]
    if choice.reference:
        shown = visible(form.reach, sight, stored.shape[1])
        shown = jnp.broadcast_to(True if shown is None else shown, (*state.shape[:2], stored.shape[1]))
        out = hopfield_retrieval_reference(form, *(x.astype(wide) for x in arrays), beta, shown)
    else:
        out = choice.run(form, RetrievalInputs(*arrays, beta, sight))
    return jnp.swapaxes(out, 1, 2).astype(dtype)


def _attention(reach, state, stored, values, beta, sight):
    """One update with softmax and dot products, through the library's attention."""
    width, value, patterns = state.shape[3], values.shape[3], stored.shape[1]
    if sight.mask is None and sight.segments is None and state.shape[1] == patterns:
        after = 0 if reach.causal else patterns
        seen = dict(is_causal=reach.causal, local_window_size=reach.window and (reach.window - 1, after))
    else:  # the library's first state, not its last, stands at the first pattern
        shown = visible(reach, sight, patterns)
        seen = dict(mask=None if shown is None else shown[:, None])
    state = (state.astype(beta.dtype) * beta[:, None]).astype(state.dtype)
    state, stored = (_widened(x, value) for x in (state, stored))
    return jax.nn.dot_product_attention(state, stored, _widened(values, width), scale=1.0, **seen)[..., :value]


def _widened(x, width):
    """The library requires queries, keys and values of equal width."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, max(width - x.shape[3], 0))])


@partial(jax.jit, static_argnums=(0, 1))
def _energy(separated, reach, state, stored, beta, given):
    dtype = accumulator(jnp.result_type(state, stored))
    own = half_square(state.astype(dtype)) if separated[2] == "dot" else 0  # also for a state that sees nothing
    state, stored, _, beta, sight, _ = _prepare(dtype, reach, state, stored, None, beta, given)
    arrays = [jnp.swapaxes(x, 1, 2) for x in (state, stored)]
    return own - jnp.swapaxes(pull(*separated, *arrays, beta, visible(reach, sight, stored.shape[1])), 1, 2)
