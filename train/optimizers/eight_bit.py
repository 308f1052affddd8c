"""Moments in 8 bits (COAT, arXiv 2410.19313): E4M3 per group of 128 entries, after dynamic range expansion.

E4M3 spans about 2^17, a group of a moment less or more. In a group with the largest magnitude a and the smallest b
(exact zeros, which stay zeros, aside), the entries are stored as

    code(x) = E4M3(sign(x) (|x| / c)^k / s),   c = sqrt(a b),   k = floor(16 log2(448^2 / 2) / log2(a / b)) / 16,

with s = (a / c)^k / 448, so that the group fills E4M3's range. A moment takes 1 + 12 / 128 bytes per entry: the code,
and k, c and s as float32 for a group. Groups run over the entries of one layer; the last may be shorter.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Float8e4m3fn

from engrax.errors import UserError
from engrax.models.parameters import LAYERS, axes_of

MOMENTS = ("mu", "nu", "trace")  # names of the fields of an optimizer's state that hold moments
GROUP = 128  # entries with common k, c and s; a moment of fewer entries in a layer stays float32
LARGEST = 448.0  # of E4M3
RANGE = LARGEST**2 / 2  # ratio of the largest to the smallest magnitude that a group is expanded to
STEEPEST = 64.0  # k of a group whose magnitudes are all alike


class EightBit(NamedTuple):
    """A moment in 8 bits, as variables of the parameter (or arrays)."""

    codes: Any  # the parameter's shape
    exponent: Any  # k [G], or [layers, G]
    centre: Any  # c, likewise
    scale: Any  # s, likewise


def encode(moment: Float[Array, "*shape"], stacked: bool = False) -> EightBit:
    """The moment in 8 bits; with `stacked`, groups run within the entries of the leading axis."""
    x = _groups(moment, stacked)
    size = jnp.abs(x)
    most = jnp.max(size, axis=-1, keepdims=True)
    least = jnp.min(jnp.where(size > 0, size, jnp.inf), axis=-1, keepdims=True)
    most, least = (jnp.where(most > 0, end, 1.0) for end in (most, least))  # a group of zeros
    bits = jnp.log2(most) - jnp.log2(least)
    exponent = jnp.minimum(jnp.floor(16 * jnp.log2(RANGE) / jnp.maximum(bits, 1e-6)) / 16, STEEPEST)
    centre = jnp.sqrt(most) * jnp.sqrt(least)
    scale = (most / centre) ** exponent / LARGEST
    codes = jnp.sign(x) * jnp.clip((size / centre) ** exponent / scale, 0, LARGEST)
    codes = _ungrouped(codes.astype(jnp.float8_e4m3fn), moment.shape, stacked)
    return EightBit(codes, *(part[..., 0] for part in (exponent, centre, scale)))


def decode(stored: EightBit, stacked: bool = False) -> Float[Array, "*shape"]:
    """The moment as float32."""
    exponent, centre, scale = (part[..., None] for part in stored[1:])
    x = _groups(stored.codes, stacked).astype(jnp.float32)
    size = (jnp.abs(x) * scale) ** (1 / exponent) * centre
    return _ungrouped(jnp.where(x == 0, 0.0, jnp.sign(x) * size), stored.codes.shape, stacked)


def _groups(x: Float[Array, "*shape"] | Float8e4m3fn[Array, "*shape"], stacked: bool) -> Array:
    """[G, 128] or [layers, G, 128], filled up with zeros."""
    rows = x.reshape(*x.shape[:1], -1) if stacked else x.reshape(-1)
    room = [(0, 0)] * (rows.ndim - 1) + [(0, -rows.shape[-1] % GROUP)]
    return jnp.pad(rows, room).reshape(*rows.shape[:-1], -1, GROUP)


def _ungrouped(groups: Array, shape: tuple[int, ...], stacked: bool) -> Array:
    rows = groups.reshape(*groups.shape[:1], -1) if stacked else groups.reshape(-1)
    size = jnp.zeros(shape[1:] if stacked else shape, jnp.int8).size
    return rows[..., :size].reshape(shape)


def with_eight_bit_moments(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with its moments (MOMENTS) kept in 8 bits between steps; it computes in float32.

    Raises UserError at `init` if its state has none.
    """

    def init(params):
        state = _encoded(tx.init(params))
        if not any(isinstance(leaf, EightBit) for leaf in jax.tree.leaves(state, is_leaf=_is_stored)):
            raise UserError(
                "optimizer.moments='float8': this optimizer has no moments to keep in 8 bits "
                f"(of at least {GROUP} entries in a layer); leave it at float32."
            )
        return state

    def update(updates, state, params=None):
        updates, state = tx.update(updates, _decoded(state), params)
        return updates, _encoded(state)

    return optax.GradientTransformation(init, update)


def _is_stored(x: Any) -> bool:
    return isinstance(x, EightBit | nnx.Variable)


def _stacked(variable: nnx.Variable) -> bool:
    return axes_of(variable)[:1] == (LAYERS,)


def _encoded(state: Any) -> Any:
    def one(path, leaf):
        moment = any(getattr(entry, "name", None) in MOMENTS for entry in path)
        if not moment or not isinstance(leaf, nnx.Variable) or not jax.tree.leaves(leaf):
            return leaf
        value, stacked = leaf.get_value(), _stacked(leaf)
        if value.size < GROUP * (value.shape[0] if stacked else 1):
            return leaf
        return EightBit(*(leaf.replace(part) for part in encode(value, stacked)))

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=_is_stored)


def _decoded(state: Any) -> Any:
    def one(leaf):
        if not isinstance(leaf, EightBit):
            return leaf
        moment = decode(EightBit(*(part.get_value() for part in leaf)), _stacked(leaf.codes))
        return leaf.codes.replace(moment)

    return jax.tree.map(one, state, is_leaf=_is_stored)
