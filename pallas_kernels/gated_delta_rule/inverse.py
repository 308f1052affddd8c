"""The inverse (I + A)^-1 of a unit lower triangular matrix, A strictly lower: the delta rule's system of one chunk.

There are two stable methods. Block recursion, for XLA: small diagonal blocks by forward substitution, then

    [ X1          ]        the inverse of the lower left block A21 of every pair,
    [ -X2 A21 X1   X2 ]    X1 and X2 the inverses above and beside it.

The ladder, for kernels, is the same recursion on whole matrices, with masks instead of slices:
X <- X - X S_b X for b = 1, 2, 4, ..., where S_b keeps of A the lower left block of every pair of blocks of size b.

The series of powers of A, summed by doubling, is not used. It is equal in exact arithmetic, but for repeated keys its
terms grow to 1e9 and more before they cancel.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

BASE = 16  # rows of a block solved by substitution


def _matmul(a, b):
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _substitute(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """Returns (I + A)^-1 row by row: X_i = e_i - sum_{j<i} A_ij X_j."""
    unit = jnp.eye(a.shape[-1], dtype=a.dtype)

    def row(i, x):
        a_i = lax.dynamic_index_in_dim(a, i, a.ndim - 2, keepdims=False)
        x_i = lax.dynamic_index_in_dim(unit, i, keepdims=False) - jnp.sum(a_i[..., None] * x, axis=-2)
        return lax.dynamic_update_index_in_dim(x, x_i, i, a.ndim - 2)

    return lax.fori_loop(0, a.shape[-1], row, jnp.zeros_like(a))


def _diagonal_blocks(a, size, down):
    """Returns `[..., n, size, size]`: the blocks on the diagonal, or with down = 1 below it, of every pair."""
    step = size * (1 + down)
    starts = range(0, a.shape[-1], step)
    return jnp.stack([a[..., i + down * size : i + step, i : i + size] for i in starts], axis=-3)


def _recurse(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    length = a.shape[-1]
    size = blocks = 1
    while size < min(length, BASE):
        size *= 2
    while blocks * size < length:
        blocks *= 2
    # Rows of zeros at the end do not change the rows before them.
    pad = blocks * size - length
    a = jnp.pad(a, [(0, 0)] * (a.ndim - 2) + [(0, pad)] * 2)
    x = _substitute(_diagonal_blocks(a, size, 0))
    while size < a.shape[-1]:
        upper, lower = x[..., 0::2, :, :], x[..., 1::2, :, :]
        corner = -_matmul(lower, _matmul(_diagonal_blocks(a, size, 1), upper))
        top = jnp.concatenate([upper, jnp.zeros_like(upper)], axis=-1)
        x = jnp.concatenate([top, jnp.concatenate([corner, lower], axis=-1)], axis=-2)
        size *= 2
    return x[..., 0, :length, :length]


def ladder_inverse(a: Float[Array, "C C"], matmul=_matmul) -> Float[Array, "C C"]:
    """Returns (I + A)^-1 of one strictly lower A, with whole products and masks only, so that it lowers in kernels."""
    size = a.shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, a.shape, axis) for axis in (0, 1))

    x = jnp.where(row == column, 1, 0).astype(a.dtype)
    for level in range((size - 1).bit_length()):  # blocks of size 2^level
        odd = ((row >> level) & 1) == 1
        corner = jnp.where(odd & ((column >> level) == (row >> level) - 1), a, 0)
        x = x - corner if level == 0 else x - matmul(matmul(x, corner), x)
    return x


@jax.custom_vjp
def unit_lower_inverse(a: Float[Array, "*N C C"]) -> Float[Array, "*N C C"]:
    """Returns (I + A)^-1; entries of A on and above the diagonal count as zero and get no gradient."""
    return _recurse(jnp.tril(a, -1))


def _inverse_fwd(a):
    x = unit_lower_inverse(a)
    return x, x


def _inverse_bwd(x, x_bar):
    transposed = jnp.swapaxes(x, -1, -2)
    return (-jnp.tril(_matmul(transposed, _matmul(x_bar, transposed)), -1),)


unit_lower_inverse.defvjp(_inverse_fwd, _inverse_bwd)
