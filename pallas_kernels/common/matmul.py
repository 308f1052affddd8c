"""Matrix products of the chunkwise forms: operands have the inputs' dtype, sums and results the state's.

`dot` works both batched by `jax.vmap` in the XLA forms and two-dimensional in a kernel.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float

ROWS, COLUMNS = 0, 1  # the summed axis of an operand


class EmulatedPrecision(NamedTuple):
    """Rounds operands to `dtype` but multiplies in the accumulator's: XLA's CPU backend lacks 16-bit products."""

    dtype: DTypeLike


Operands = DTypeLike | EmulatedPrecision  # the dtype of a product's operands


def emulated_on_cpu(dtype: DTypeLike) -> Operands:
    """Returns the operands that give the same products on CPU."""
    return EmulatedPrecision(dtype) if jnp.dtype(dtype).itemsize == 2 else dtype


def accumulator(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of states, gates and sums for tokens of this dtype: float64 for float64, else float32."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def dot(
    a: Float[Array, "_ _"], b: Float[Array, "_ _"], axis_a: int, axis_b: int, operands: Operands
) -> Float[Array, "_ _"]:
    """Returns the product of two matrices, summed over one axis of each; the result's rows are the other axis of a.

    Both are rounded to the operands' dtype for the matrix unit. The derivative rounds them and the cotangent in the
    same way. Results have the accumulator's dtype.
    """
    a, b = rounded(a, operands), rounded(b, operands)
    contract = (((axis_a,), (axis_b,)), ((), ()))
    return lax.dot_general(a, b, contract, precision=precision(a), preferred_element_type=accumulator(a.dtype))


def rounded(x: Float[Array, "..."], operands: Operands) -> Float[Array, "..."]:
    """Returns x rounded as an operand of a product."""
    if not isinstance(operands, EmulatedPrecision):
        return x.astype(operands)
    bits = jnp.finfo(operands.dtype)
    return lax.reduce_precision(x.astype(accumulator(operands.dtype)), bits.nexp, bits.nmant)


def precision(operand: Float[Array, "..."]) -> lax.Precision:
    """Returns the precision that keeps all digits of an operand; matrix units take 16 bits."""
    return lax.Precision.DEFAULT if operand.dtype.itemsize == 2 else lax.Precision.HIGHEST


def _dot_fwd(a, b, axis_a, axis_b, operands):
    return dot(a, b, axis_a, axis_b, operands), (a, b)


def _dot_bwd(axis_a, axis_b, operands, saved, bar):
    a, b = saved

    def product(x, y, axis_x, axis_y):
        return dot(x, y, axis_x, axis_y, operands)

    a_bar = product(bar, b, COLUMNS, 1 - axis_b) if axis_a == COLUMNS else product(b, bar, 1 - axis_b, COLUMNS)
    b_bar = product(a, bar, 1 - axis_a, ROWS) if axis_b == ROWS else product(bar, a, ROWS, 1 - axis_a)
    return a_bar.astype(a.dtype), b_bar.astype(b.dtype)


dot.defvjp(_dot_fwd, _dot_bwd)
