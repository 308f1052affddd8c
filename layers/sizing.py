"""Mixers by the size of their state: the bytes of a state, and settings whose state has about a given size.

`MixerConfig.scaled` says which settings grow with the state; the bytes are those of the states themselves
(`init_state(1)`), traced without allocation. So a mixer of another file takes a size without an edit here.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
from flax import nnx

from engrax.errors import UserError
from engrax.layers.mixer import MixerConfig, as_mixer

STEPS = 8  # factors tried per doubling
DOUBLINGS = (-16, 8)  # the smallest and the largest factor, as powers of two
NEAR = 1.5  # largest ratio of the found and the wanted bytes


class OneSize(UserError):
    """A mixer has one size of state only."""


@functools.cache
def state_bytes(config: MixerConfig, dim: int) -> int:
    """Bytes of the state of one sequence in one layer, caches and tails of convolutions included, in float32."""
    state = jax.eval_shape(lambda: as_mixer(config.build(dim, rngs=nnx.Rngs(0))).init_state(1))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def sized(config: MixerConfig, dim: int, target: int) -> MixerConfig:
    """The settings with a state nearest to `target` bytes in a layer of width `dim`.

    The state must not shrink as the factor of `scaled` grows; settings that the config refuses count as too small.
    Raises OneSize if the mixer has one size only, UserError if it has none within a factor of `NEAR`.
    """
    name = config.registered_name or type(config).__name__
    scale = _scale(config, dim)
    if scale is None:
        raise OneSize(
            f"{name} has one size of state only, {state_bytes(config, dim):,} bytes: none of its integer fields "
            "enlarges it; define `scaled` in its config."
        )

    def at(place: int) -> tuple[int, MixerConfig | None]:
        try:
            found = scale(2 ** (place / STEPS))
            return state_bytes(found, dim), found
        except (UserError, ValueError):
            return 0, None

    low, high = (STEPS * end for end in DOUBLINGS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(middle)[0] <= target else (low, middle)
    tried = [(size, found) for size, found in (at(low), at(high)) if size]
    size, found = min(tried, key=lambda pair: abs(math.log(pair[0] / target)), default=(0, None))
    if found is None or not 1 / NEAR <= size / target <= NEAR:
        nearest = f"; the nearest has {size:,}" if size else ""
        raise UserError(f"{name} has no state of about {target:,} bytes at width {dim}{nearest}.")
    return found


def _scale(config: MixerConfig, dim: int) -> Callable[[float], MixerConfig] | None:
    """factor -> settings: the config's `scaled`, or, if that does not enlarge the state, every integer field that does,
    times the factor; None if there is none."""
    now = state_bytes(config, dim)

    def grows(scale: Callable[[float], MixerConfig]) -> bool:
        try:
            return state_bytes(scale(2.0), dim) > now
        except (UserError, ValueError):
            return False

    def alone(name: str) -> Callable[[float], MixerConfig]:
        return lambda factor: config.with_fields_scaled(factor, (name,))

    if grows(config.scaled):
        return config.scaled
    integers = [f.name for f in dataclasses.fields(config) if type(getattr(config, f.name)) is int]
    growing = tuple(name for name in integers if grows(alone(name)))
    return (lambda factor: config.with_fields_scaled(factor, growing)) if growing else None
