"""The operation of a matrix memory on rows split over devices (`engrax.layers.common.sequence`).

With S_i the state before piece i, a piece maps S_i to A_i S_i + F_i. F_i is the final state of the piece from zero. A_i
is the product of the decays, or for the delta rule of the K x K matrices decay (I - beta k k^T): the final state of the
piece from the unit matrix without values. Every device computes both, the devices exchange them, and then the unchanged
operation runs from S_i. Backwards the same happens in reverse order with A_i^T and the cotangents of S_i from the
piece's own outputs. So outputs and gradients are those of the operation on whole rows, to rounding.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from engrax.layers.common import sequence
from engrax.layers.common.segments import first_real_segment
from engrax.pallas_kernels.common.decay import FLOOR, FLOOR_32
from engrax.pallas_kernels.common.segments import segment_starts

Inputs = dict[str, Array | None]  # q, k, v, g, beta
State = Float[Array, "B *N HV K V"]


class Transition(NamedTuple):
    """How a piece acts on the state before it."""

    of_piece: Callable  # (form, inputs, state, segment_ids) -> matrix; state: any, for its shape and dtype
    apply: Callable  # (matrix, state) -> state
    transposed: Callable  # (matrix, cotangent) -> cotangent


class Form(NamedTuple):
    """The static part of a call: the operation, its transition, its settings, the mesh axis."""

    operation: Callable
    transition: Transition
    settings: tuple[tuple[str, Any], ...]
    axis: str

    def run(self, inputs: Inputs, state: State, segment_ids: Int[Array, "B T"] | None) -> tuple[Array, State]:
        """The operation on this piece: (out, state after it)."""
        return self.operation(**inputs, initial_state=state, segment_ids=segment_ids, **dict(self.settings))


def split_operation(
    operation: Callable,
    transition: Transition,
    inputs: Inputs,
    state: State,
    segment_ids: Int[Array, "B T"] | None,
    *,
    keep: Bool[Array, "B N"] | None = None,
    **settings: Any,
) -> tuple[Array, State]:
    """operation(**inputs, initial_state=state, segment_ids=segment_ids, **settings) on the pieces of rows: (out of this
    piece, state after the row).

    keep: False for states that are zero after this piece, for segments with `num_segments`.
    """
    enter = None
    if segment_ids is not None and settings.get("num_segments") is None:
        none, first = jnp.full(len(segment_ids), -1, segment_ids.dtype), first_real_segment(segment_ids)
        last, _ = sequence.chain(jnp.maximum, none, jnp.max(segment_ids, axis=1))  # of the pieces before
        enter = (last < 0) | (first < 0) | (first == last)
    form = Form(operation, transition, tuple(settings.items()), sequence.axis())
    return _composed(form, inputs, state, segment_ids, enter, keep)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _composed(form, inputs, state, segment_ids, enter, keep):
    return _forward(form, inputs, state, segment_ids, enter, keep)[0]


def _forward(form, inputs, state, segment_ids, enter, keep):
    _, update = form.run(inputs, jnp.zeros_like(state), segment_ids)
    matrix = form.transition.of_piece(form, inputs, update, segment_ids)
    matrix = _where(enter, _where(keep, matrix))

    def step(state, piece):
        matrix, update = piece
        return form.transition.apply(matrix, state) + update

    before, after = sequence.chain(step, state.astype(update.dtype), (matrix, _where(keep, update)))
    (out, _), pull = jax.vjp(lambda x, s: form.run(x, s, segment_ids), inputs, _where(enter, before))
    return (out, after), (pull, matrix, enter, keep, jnp.zeros((), state.dtype))


def _backward(form, saved, bars):
    pull, matrix, enter, keep, like = saved
    out_bar, after_bar = bars

    def step(state_bar, piece):
        matrix, own_bar = piece
        return form.transition.transposed(matrix, state_bar) + own_bar

    with sequence.pieces(form.axis):  # it is traced later than the forward pass
        own_bar = _where(enter, pull((out_bar, jnp.zeros_like(after_bar)))[1])
        piece_bar, start_bar = sequence.chain(step, sequence.row_sum(after_bar), (matrix, own_bar), reverse=True)
        inputs_bar, _ = pull((out_bar, _where(keep, piece_bar)))
        start_bar = jnp.where(sequence.index() == 0, start_bar, 0)
    return inputs_bar, start_bar.astype(like.dtype), None, None, None


_composed.defvjp(_forward, _backward)


def _where(mask: Bool[Array, "B *N"] | None, x: Array) -> Array:
    return x if mask is None else jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), x, 0)


def _decays(form: Form, inputs: Inputs, state: State, segment_ids) -> Float[Array, "B *N HV K 1"]:
    """The transition of linear attention: the product of a piece's decays, 0 if a segment begins in it."""
    g = jnp.zeros(inputs["v"].shape[:3]) if inputs.get("g") is None else inputs["g"]
    g = g.astype(state.dtype)
    g = jnp.maximum(g if g.ndim == 4 else g[..., None], FLOOR if g.dtype == jnp.float64 else FLOOR_32)
    segments = dict(form.settings).get("num_segments")
    if segment_ids is None:
        total = jnp.sum(g, axis=1)
    elif segments is None:
        total = jnp.sum(jnp.where((segment_ids >= 0)[..., None, None], g, 0), axis=1)
    else:
        own = jax.nn.one_hot(segment_ids, segments, dtype=g.dtype)
        total = jnp.einsum("BTN,BTHK->BNHK", own, g, precision=jax.lax.Precision.HIGHEST)
    kept = jnp.exp(total)[..., None]
    begins = None if segment_ids is None or segments is not None else jnp.any(segment_starts(segment_ids), axis=1)
    return kept if begins is None else _where(~begins, kept)


def _matrices(form: Form, inputs: Inputs, state: State, segment_ids) -> Float[Array, "B *N HV K K"]:
    """The transition of the delta rule."""
    key, v = state.shape[-2], inputs["v"]
    unit = jnp.broadcast_to(jnp.eye(key, dtype=state.dtype), (*state.shape[:-1], key))
    return form.run(inputs | {"v": jnp.zeros((*v.shape[:3], key), v.dtype)}, unit, segment_ids)[1]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


DECAY = Transition(_decays, jnp.multiply, jnp.multiply)
DELTA = Transition(_matrices, _product, lambda matrix, bar: _product(jnp.swapaxes(matrix, -1, -2), bar))
