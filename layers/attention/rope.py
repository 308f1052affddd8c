"""Rotary positions (arXiv 2104.09864), and the scalings of their frequencies for rows longer than in pretraining."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engrax.errors import UserError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of rotary frequencies. `linear` slows all (arXiv 2306.15595), `llama3` and `yarn` (arXiv 2309.00071) the
    slow ones, `longrope` (arXiv 2402.13753) each by a factor of its own."""

    kind: Literal["none", "linear", "llama3", "yarn", "longrope"] = "none"
    factor: float = 1.0  # a slowed frequency is divided by it
    low_freq_factor: float = 1.0  # llama3: wavelengths above original_context / this are fully slowed
    high_freq_factor: float = 4.0  # llama3: wavelengths below original_context / this do not change
    original_context: int = 8192  # llama3, yarn, longrope: tokens of a row in pretraining
    beta_fast: float = 32.0  # yarn: a channel with more turns in original_context does not change
    beta_slow: float = 1.0  # yarn: a channel with fewer turns in original_context is fully slowed
    truncate: bool = True  # yarn: both limits are rounded to whole channels
    short_factors: tuple[float, ...] = ()  # longrope: divisors of the frequencies in rows of up to original_context
    long_factors: tuple[float, ...] = ()  # longrope: those in longer rows
    magnitude: float = 1.0  # yarn, longrope: factor of the rotated channels

    def __post_init__(self):
        if self.factor <= 0 or self.original_context < 1:
            raise UserError(
                f"rope_scaling.factor={self.factor} must be positive and "
                f"original_context={self.original_context} at least 1 token."
            )
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise UserError(
                    f"rope_scaling.{low}={getattr(self, low)} must lie between 0 and {high}={getattr(self, high)}."
                )
        if self.magnitude <= 0 or min((*self.short_factors, *self.long_factors), default=1) <= 0:
            raise UserError("rope_scaling.magnitude, short_factors and long_factors must be positive.")
        if len(self.short_factors) != len(self.long_factors) or (self.kind == "longrope" and not self.long_factors):
            raise UserError("rope_scaling.short_factors and long_factors must have one number for each rotated pair.")

    def apply(self, frequency: Float[np.ndarray, " N"], length: int | None = None) -> Float[np.ndarray, " N"]:
        """The scaled frequencies, radians per token; length: most tokens of a row, None = any number."""
        if self.kind == "none":
            return frequency
        if self.kind == "longrope":
            is_long = length is None or length > self.original_context
            factors = np.asarray(self.long_factors if is_long else self.short_factors)
            if len(factors) != len(frequency):
                raise UserError(f"rope_scaling has {len(factors)} long_factors for {len(frequency)} rotated pairs.")
            return frequency / factors
        kept = 0.0
        if self.kind == "llama3":
            turns = self.original_context * frequency / (2 * math.pi)  # in a row of pretraining
            kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        if self.kind == "yarn":
            kept = 1 - self._slowed(frequency)
        return frequency * (kept + (1 - kept) / self.factor)

    def _slowed(self, frequency: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
        """How far yarn slows each channel: from 0 to 1, linear in its number."""
        pairs = len(frequency)
        step = -math.log(frequency[1]) if pairs > 1 else math.inf  # log of the ratio of neighbours
        first, last = (
            math.log(self.original_context / (turns * 2 * math.pi)) / step for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        return np.clip((np.arange(pairs) - first) / (last - first if first != last else 0.001), 0, 1)


def rotate(
    x_BTHK: Float[Array, "B T H K"],
    position_BT: Int[Array, "B T"],
    base: float,
    scaling: RopeScaling = RopeScaling(),
    *,
    width: int | None = None,
    length: int | None = None,
) -> Float[Array, "B T H K"]:
    """Rotary embedding: channel pairs (i, i + W/2) turned by position * base^(-2i/W) radians, before the scaling.

    width: W, the rotated channels, the first of a head; None = all. length: most tokens of a row (`RopeScaling.apply`).
    """
    width = x_BTHK.shape[-1] if width is None else width
    half = width // 2
    dtype = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    frequency = scaling.apply(base ** (-np.arange(half) / half), length)
    angle = _angles(position_BT, frequency, dtype)[..., None, :]
    a, b = x_BTHK[..., :half].astype(dtype), x_BTHK[..., half:width].astype(dtype)
    turned = jnp.concatenate(
        [a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1
    )
    turned = turned if scaling.magnitude == 1 else turned * scaling.magnitude
    turned = turned.astype(x_BTHK.dtype)
    return turned if width == x_BTHK.shape[-1] else jnp.concatenate([turned, x_BTHK[..., width:]], axis=-1)


def _angles(position_BT: Int[Array, "B T"], frequency: Float[np.ndarray, " N"], dtype: Any) -> Float[Array, "B T N"]:
    """position * frequency in radians, modulo 2 pi, as exact at a late position as at an early one.

    A float32 product has an error of position * 6e-8. So frequencies are counted in units of 2^-32 turns, split into an
    integer and a remainder. The product with the position is in uint32, which drops whole turns by overflow.
    """
    if dtype == jnp.float64:
        return position_BT[..., None] * jnp.asarray(frequency, dtype)
    units = frequency / (2 * math.pi) * 2.0**32  # 2^-32 turns per token
    whole, rest = np.round(units), units - np.round(units)
    whole, rest = np.mod(whole, 2.0**32).astype(np.uint32), rest.astype(np.float32)
    position = position_BT[..., None]
    drift = jnp.round(position.astype(dtype) * rest).astype(jnp.int32)  # below 2^30 for any position
    turned = position.astype(jnp.uint32) * whole + drift.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(turned, jnp.int32).astype(dtype) * (2 * math.pi / 2**32)
