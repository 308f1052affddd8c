"""One chunk of one head of the gated delta rule as matrix products, shared by the kernels and the XLA form.

With G the cumulative log decay of the chunk, G_C its last, and S the state before the chunk:

    A_ij = beta_i (k_i . k_j) exp(G_i - G_j), j < i        X = (I + A)^-1
    written = X beta (V - exp(G) K S)                      what each token writes in its key's direction
    out = scale (exp(G) Q S + (Q K^T o exp(G_i - G_j), j <= i) written)
    S' = exp(G_C) S + (exp(G_C - G) K)^T written

(arXiv:2412.06464; with one gate per channel, G is [C, K] and its exponentials act inside the products with K.) The part
that does not depend on S is `local`: written = u - w S with u = X beta V and w = X beta exp(G) K.

Arrays are two-dimensional. The decay is that of `linear_attention.chunk`; beta is a column. All arrays have the dtype
of the states, except q, k and v, which keep their own.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from engrax.pallas_kernels.common.decay import Decay, channel_scores, difference
from engrax.pallas_kernels.common.matmul import COLUMNS, ROWS, EmulatedPrecision, Operands, dot
from engrax.pallas_kernels.gated_delta_rule.inverse import unit_lower_inverse
from engrax.pallas_kernels.linear_attention.chunk import ChunkDecay, ScalarDecay, causal, decay_matrix


class DeltaForm(NamedTuple):
    """The static settings. operands: of the matrix products, the dtype of q, k and v (or its `EmulatedPrecision`)."""

    scale: float
    operands: Operands

    @property
    def rounds(self) -> bool:
        """Whether operands have fewer bits than the sums."""
        return isinstance(self.operands, EmulatedPrecision) or jnp.dtype(self.operands).itemsize == 2

    def matmul(self, a, b):  # a b
        return dot(a, b, COLUMNS, ROWS, self.operands)

    def matmul_right(self, a, b):  # a b^T
        return dot(a, b, COLUMNS, COLUMNS, self.operands)

    def matmul_left(self, a, b):  # a^T b
        return dot(a, b, ROWS, ROWS, self.operands)

    def gram(self, k):  # k k^T
        return _gram(self, k)

    def solve(self, inverse, b):  # X b
        return sum(self.matmul(part, b) for part in self._parts(inverse))

    def solve_left(self, inverse, b):  # X^T b
        return sum(self.matmul_left(part, b) for part in self._parts(inverse))

    def _parts(self, inverse):
        """Splits X into two parts that are exact in 8 bits, if operands are rounded.

        For similar keys, X b is a sum with cancellation. Rounding X only once would make its error up to 30 times that
        of all other roundings.
        """
        if not self.rounds:
            return (inverse,)
        high = lax.bitcast_convert_type(lax.bitcast_convert_type(inverse, jnp.int32) & ~0xFFFF, jnp.float32)
        return high, inverse - high  # by bits: XLA may remove a conversion and its inverse


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gram(form, k):
    """Returns k k^T; for float32, as exactly as float32 can represent it.

    If a key repeats, so does the rounding error of its product with itself. At beta 2, 64 such tokens add up to 30
    times the recurrence's own error. For keys rounded to 11 bits, sums of products are exact, and the rest is 2^-12 of
    the keys: with k = h + l, k k^T = h h^T + m + m^T, m = l (h + l / 2)^T.
    """
    if form.operands != jnp.float32:
        return form.matmul_right(k, k)
    norm = jnp.sqrt(jnp.max(jnp.sum(k * k, axis=1, keepdims=True), axis=0, keepdims=True))
    exponent = lax.bitcast_convert_type(jnp.maximum(norm, 1e-30), jnp.int32) & 0x7F800000
    step = lax.bitcast_convert_type(exponent, jnp.float32) * 2.0**-11  # norm < 2^12 steps: sums < 2^24 steps^2
    high = jnp.round(k / step) * step
    low = k - high
    rest = form.matmul_right(low, high + 0.5 * low)
    return form.matmul_right(high, high) + (rest + rest.T)


def _gram_bwd(form, k, bar):
    return (form.matmul(bar + bar.T, k),)


_gram.defvjp(lambda form, k: (_gram(form, k), k), _gram_bwd)


class DeltaTokens(NamedTuple):
    """The tokens of a chunk; decay None: no gate, `ScalarDecay`, or hi and lo `[C, K]`."""

    q: Float[Array, "C K"]
    k: Float[Array, "C K"]
    v: Float[Array, "C V"]
    beta: Float[Array, "C 1"]
    decay: ChunkDecay


class Local(NamedTuple):
    """The part of a chunk that does not depend on the state."""

    scores: Float[Array, "C C"]  # of queries and keys, j <= i
    inverse: Float[Array, "C C"]  # X
    w: Float[Array, "C K"]
    u: Float[Array, "C V"]


class Adjoint(NamedTuple):
    """The contributions of out's cotangent to the written values and to the state before the chunk."""

    written_bar: Float[Array, "C V"]
    state_bar: Float[Array, "K V"]


def widen(tokens: DeltaTokens) -> DeltaTokens:
    """Returns the tokens with q, k and v in the dtype of the states."""
    q, k, v = (x.astype(tokens.beta.dtype) for x in tokens[:3])
    return tokens._replace(q=q, k=k, v=v)


def pair_scores(
    form: DeltaForm, tokens: DeltaTokens, by_channel=channel_scores
) -> tuple[Float[Array, "C C"], Float[Array, "C C"]]:
    """Returns the scores of queries with keys, 0 above the diagonal, and A."""
    q, k, decay, size = tokens.q, tokens.k, tokens.decay, tokens.k.shape[0]
    if isinstance(decay, Decay):
        queries, keys = by_channel((q, k), k, decay, form.operands)
    else:
        queries, keys = form.matmul_right(q, k), form.gram(k)
        if decay is None:
            queries = jnp.where(causal(size), queries, 0)
        else:
            factor = decay_matrix(decay)
            queries, keys = factor * queries, factor * keys
    return queries, tokens.beta * jnp.where(causal(size, strict=True), keys, 0)


# Each of the next four functions has three forms. One gate per token multiplies a product's rows in the states' dtype,
# so that q and k enter the product unrounded. One gate per channel must multiply q or k itself.


def _columns(decay: ScalarDecay | Decay) -> Decay:
    return decay.column if isinstance(decay, ScalarDecay) else decay


def _since_start(decay):
    columns = _columns(decay)
    return jnp.exp(columns.hi + columns.lo)


def _until_end(decay):
    columns = _columns(decay)
    return jnp.exp(difference(Decay(columns.hi[-1:], columns.lo[-1:]), columns))


def from_state(form: DeltaForm, decay: ChunkDecay, rows: Float[Array, "C K"], state: Float[Array, "K V"]):
    """Returns exp(G) rows S: the rows' reads from the state before the chunk."""
    if decay is None:
        return form.matmul(rows, state)
    if isinstance(decay, Decay):
        return form.matmul(_since_start(decay) * rows, state)
    return _since_start(decay) * form.matmul(rows, state)


def to_start(form: DeltaForm, decay: ChunkDecay, rows: Float[Array, "C K"], values: Float[Array, "C V"]):
    """Returns (exp(G) rows)^T values, the transpose of `from_state`."""
    if decay is None:
        return form.matmul_left(rows, values)
    if isinstance(decay, Decay):
        return form.matmul_left(_since_start(decay) * rows, values)
    return form.matmul_left(rows, _since_start(decay) * values)


def to_state(form: DeltaForm, decay: ChunkDecay, k: Float[Array, "C K"], written: Float[Array, "C V"]):
    """Returns (exp(G_C - G) K)^T written: the chunk's update of the state."""
    if decay is None:
        return form.matmul_left(k, written)
    if isinstance(decay, Decay):
        return form.matmul_left(_until_end(decay) * k, written)
    return form.matmul_left(k, _until_end(decay) * written)


def from_end(form: DeltaForm, decay: ChunkDecay, k: Float[Array, "C K"], state_bar: Float[Array, "K V"]):
    """Returns exp(G_C - G) K S', the transpose of `to_state`."""
    if decay is None:
        return form.matmul(k, state_bar)
    if isinstance(decay, Decay):
        return form.matmul(_until_end(decay) * k, state_bar)
    return _until_end(decay) * form.matmul(k, state_bar)


def decayed(decay: ChunkDecay, state: Float[Array, "K V"]) -> Float[Array, "K V"]:
    """Returns exp(G_C) S."""
    if decay is None:
        return state
    whole = _since_start(decay)[-1:]
    if isinstance(decay, Decay):
        whole = jnp.broadcast_to(whole, (state.shape[1], whole.shape[1])).T  # a row to a column, as kernels allow
    return whole * state


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _solve(form, a, inverse, rows):
    """Returns (I + A)^-1 rows, given the inverse; A is needed only for the derivative."""
    return form.solve(inverse, rows)


def _solve_fwd(form, a, inverse, rows):
    solved = form.solve(inverse, rows)
    return solved, (inverse, solved)


def _solve_bwd(form, saved, bar):
    inverse, solved = saved
    rows_bar = form.solve_left(inverse, bar)
    return -form.matmul_right(rows_bar, solved), jnp.zeros_like(inverse), rows_bar


_solve.defvjp(_solve_fwd, _solve_bwd)


def local(
    form: DeltaForm,
    tokens: DeltaTokens,
    inverse: Float[Array, "C C"] | None = None,
    invert=unit_lower_inverse,
    by_channel=channel_scores,
) -> Local:
    """Returns the part of a chunk that does not depend on the state; X is computed by `invert` unless given.

    by_channel: computes the scores under one gate per channel (kernels have their own versions of both).
    """
    tokens = widen(tokens)
    scores, a = pair_scores(form, tokens, by_channel)
    inverse = invert(a) if inverse is None else inverse
    k, v, decay, x = tokens.k, tokens.v, tokens.decay, inverse * tokens.beta.T
    if form.rounds and isinstance(decay, ScalarDecay):  # beta and the decay multiply X, so k and v enter unrounded
        u, w = form.solve(x, v), form.solve(x * jnp.exp(decay.row.hi + decay.row.lo), k)
    else:
        k = k if decay is None else _since_start(decay) * k
        both = form.solve(x, jnp.concatenate([v, k], axis=1))
        u, w = both[:, : v.shape[1]], both[:, v.shape[1] :]
    return Local(scores, inverse, w, u)


def advance(form: DeltaForm, tokens: DeltaTokens, part: Local, state: Float[Array, "K V"]):
    """Returns (S', written)."""
    written = part.u - form.matmul(part.w, state)
    return decayed(tokens.decay, state) + to_state(form, tokens.decay, widen(tokens).k, written), written


def output(form: DeltaForm, tokens: DeltaTokens, scores: Float[Array, "C C"], written: Float[Array, "C V"], state):
    """Returns out, in the dtype of the states."""
    read = from_state(form, tokens.decay, widen(tokens).q, state)
    return form.scale * (read + form.matmul(scores, written))


def adjoint(form: DeltaForm, tokens: DeltaTokens, scores: Float[Array, "C C"], out_bar: Float[Array, "C V"]) -> Adjoint:
    """Returns the part of a chunk's derivative by its state that does not depend on the cotangent of S'."""
    out_bar = form.scale * out_bar
    return Adjoint(form.matmul_left(scores, out_bar), to_start(form, tokens.decay, widen(tokens).q, out_bar))


def retreat(
    form: DeltaForm, tokens: DeltaTokens, w: Float[Array, "C K"], part: Adjoint, state_bar: Float[Array, "K V"]
):
    """Returns the cotangent of S, given the cotangent of S'."""
    written_bar = part.written_bar + from_end(form, tokens.decay, widen(tokens).k, state_bar)
    return part.state_bar + decayed(tokens.decay, state_bar) - form.matmul_left(w, written_bar)


def chunk(
    form: DeltaForm,
    tokens: DeltaTokens,
    state: Float[Array, "K V"],
    inverse: Float[Array, "C C"] | None = None,
    invert=unit_lower_inverse,
    by_channel=channel_scores,
) -> tuple[tuple[Float[Array, "C V"], Float[Array, "K V"]], Float[Array, "C C"]]:
    """Returns (out, S'), X of one chunk, all in the states' dtype; X is computed by `invert` unless given.

    Its derivative (`jax.vjp` by tokens and state) treats X as a constant, yet is exact: the derivative of the solution
    X b is written by hand, -(X^T bar) (X b)^T for A.
    """
    tokens = widen(tokens)
    scores, a = pair_scores(form, tokens, by_channel)
    inverse = lax.stop_gradient(invert(a) if inverse is None else inverse)
    missing = tokens.v - from_state(form, tokens.decay, tokens.k, state)
    written = _solve(form, a, inverse, tokens.beta * missing)
    after = decayed(tokens.decay, state) + to_state(form, tokens.decay, tokens.k, written)
    return (output(form, tokens, scores, written, state), after), inverse
