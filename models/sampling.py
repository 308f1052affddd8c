"""Sampling of tokens: the settings and the draw from logits. All settings are traced, so a change compiles nothing.

The order is the usual one: temperature, then top-k, then top-p among those, then min-p. Every row has its own key, so
its draws do not depend on the other rows or their number.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError

STOPS = 8  # stop tokens are padded to a multiple of it, so a new number rarely compiles


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings of sampling. Raises UserError for a value out of range."""

    temperature: float = 0.8  # 0 takes the most likely token
    top_k: int | None = None  # only the k most likely tokens
    top_p: float | None = None  # only the most likely tokens that together reach this probability
    min_p: float | None = None  # only tokens with at least this fraction of the largest probability
    stop: int | str | tuple[int | str, ...] = ()  # tokens, or texts, that end a row; the row's output includes them
    seed: int = 0  # seed of the draws

    def __post_init__(self):
        stop = (self.stop,) if isinstance(self.stop, int | str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        if not (_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise UserError(f"temperature={self.temperature} must be a number that is not negative.")
        if self.top_k is not None and not (_whole(self.top_k) and self.top_k >= 1):
            raise UserError(f"top_k={self.top_k} must be a whole number of at least 1; None keeps all tokens.")
        if self.top_p is not None and not (_number(self.top_p) and 0 < self.top_p <= 1):
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1; None keeps all tokens.")
        if self.min_p is not None and not (_number(self.min_p) and 0 <= self.min_p <= 1):
            raise UserError(f"min_p={self.min_p} must be 0 to 1; None keeps all tokens.")
        if not (_whole(self.seed) and 0 <= self.seed < 2**32):
            raise UserError(f"seed={self.seed} must be a whole number from 0 to {2**32 - 1}.")
        for item in stop:
            if not (_whole(item) or isinstance(item, str)) or item == "":
                raise UserError(f"stop={item!r} must be a token's id or a text that is not empty.")

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The text stops."""
        return tuple(item for item in self.stop if isinstance(item, str))

    def traced(self, streams: Int[np.ndarray, " B"], end_of_text: tuple[int, ...] = ()) -> "Traced":
        """The settings as arrays; `streams` numbers the rows that have read the same tokens."""
        stop = [*(item for item in self.stop if not isinstance(item, str)), *end_of_text]
        stop += [-1] * (-len(stop) % STOPS or (0 if stop else STOPS))
        return Traced(
            np.float32(self.temperature),
            np.int32(min(self.top_k or 2**31 - 1, 2**31 - 1)),
            np.float32(1 if self.top_p is None else self.top_p),
            np.float32(self.min_p or 0),
            np.asarray(stop, np.int32),
            np.uint32(self.seed),
            np.asarray(streams, np.uint32),
        )


def of(sampling: Sampling | None, settings: dict) -> Sampling:
    """The settings, given as a `Sampling` or by name. Raises UserError for both at once, or an unknown name."""
    if sampling is not None and settings:
        raise UserError(f"give sampling or {', '.join(settings)}, not both; `dataclasses.replace` changes a Sampling.")
    known = [field.name for field in dataclasses.fields(Sampling)]
    for name in settings:
        if name not in known:
            raise UserError(f"sampling has no setting {name!r} (known: {', '.join(known)}).")
    return Sampling(**settings) if sampling is None else sampling


class Traced(NamedTuple):
    """`Sampling` as arrays."""

    temperature: Float[np.ndarray, ""]
    top_k: Int[np.ndarray, ""]
    top_p: Float[np.ndarray, ""]
    min_p: Float[np.ndarray, ""]
    stop: Int[np.ndarray, " N"]  # -1 = no token
    seed: Int[np.ndarray, ""]
    streams: Int[np.ndarray, " B"]


def choose(logits_BV: Float[Array, "B V"], position: Int[Array, " B"], settings: Traced) -> Int[Array, " B"]:
    """Draws each row's token; `position` is the number of tokens that the row has read."""

    def draw(logits, stream, position):
        key = jax.random.key(settings.seed)
        return jax.random.categorical(jax.random.fold_in(jax.random.fold_in(key, stream), position), logits)

    def drawn(logits_BV):
        # Logits are shifted before the division: a small temperature gives -inf, never inf - inf.
        scaled = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / settings.temperature
        sorts = (settings.top_k < logits_BV.shape[-1]) | (settings.top_p < 1)
        scaled = jax.lax.cond(sorts, lambda x: jnp.where(_likeliest(x, settings), x, -jnp.inf), lambda x: x, scaled)
        scaled = jnp.where(scaled >= jnp.log(settings.min_p), scaled, -jnp.inf)
        return jax.vmap(draw)(scaled, settings.streams, position)

    greedy = settings.temperature == 0
    chosen = jax.lax.cond(greedy, lambda x: jnp.argmax(x, axis=-1), drawn, logits_BV)
    return chosen.astype(jnp.int32)


def _likeliest(logits_BV: Float[Array, "B V"], settings: Traced) -> Bool[Array, "B V"]:
    """True for the tokens that top-k and top-p keep; among equal ones, the first."""
    order = jnp.argsort(-logits_BV, axis=-1, stable=True)
    place = jnp.argsort(order, axis=-1)
    falling = jnp.take_along_axis(logits_BV, order, axis=-1)
    kept = jnp.arange(logits_BV.shape[-1]) < settings.top_k
    p = jax.nn.softmax(jnp.where(kept, falling, -jnp.inf), axis=-1)
    kept = kept & (jnp.cumsum(p, axis=-1) - p < settings.top_p)
    return jnp.take_along_axis(kept, place, axis=-1)


def _number(x) -> bool:
    return isinstance(x, int | float | np.number) and not isinstance(x, bool) and not math.isnan(x)


def _whole(x) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool)
