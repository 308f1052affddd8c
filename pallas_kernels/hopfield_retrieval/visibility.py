"""Which stored patterns a state sees: by place, by segment, or by a dense mask.

State n has the place n + (M - N) among the M patterns: the last of the N states stands at the last pattern. Pattern m
has the age n + (M - N) - m. The state sees it if all of these hold that apply: causal, age >= 0; window, age < window;
segments, equal ids of at least 0; mask, True.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from engrax.pallas_kernels.hopfield_retrieval.types import Reach, Sight

BLIND, UNSEEN = -1, -2  # the ids of states that see nothing and of patterns that no state sees: never equal


def resolve(reach: Reach, given: Sight, states: int, patterns: int) -> Sight:
    """Returns the sight that implementations take: patterns have ids of their own, and equal ids see each other."""
    ids, stored = given.segments, given.stored_segments
    if ids is not None:
        stored = ids if stored is None else stored
        ids, stored = jnp.where(ids >= 0, ids, BLIND), jnp.where(stored >= 0, stored, UNSEEN)
    by_place = reach.causal or reach.window is not None
    place = jnp.arange(patterns - states, patterns, dtype=jnp.int32) if by_place else None
    return Sight(given.mask, ids, stored, place)


def visible(reach: Reach, sight: Sight, patterns: int) -> Bool[Array, "_ _ M"] | None:
    """Returns the dense mask of a resolved sight, with axes of 1 where rows or states agree; None: all is visible."""
    shown = sight.mask
    if sight.segments is not None:
        shown = sight.segments[:, :, None] == sight.stored_segments[:, None]
    if sight.place is None:
        return shown
    age = sight.place[:, None] - jnp.arange(patterns, dtype=jnp.int32)
    limits = [age >= 0] if reach.causal else []
    limits += [] if reach.window is None else [age < reach.window]
    for near in limits:
        shown = near[None] if shown is None else shown & near
    return shown


def sees_and_seen(
    reach: Reach, given: Sight, sight: Sight, states: int, patterns: int
) -> tuple[Bool[Array, "_ _"] | None, Bool[Array, "_ M"] | None]:
    """Returns which states see a pattern and which patterns a state sees; None: all. sight: `given`, resolved."""
    if given.mask is None and given.stored_segments is None and states == patterns:  # a state sees the one at its place
        real = None if given.segments is None else given.segments >= 0
        return real, real
    shown = visible(reach, sight, patterns)
    return (None, None) if shown is None else (jnp.any(shown, axis=2), jnp.any(shown, axis=1))


def dense_mask(
    batch: int,
    states: int,
    patterns: int,
    *,
    causal: bool = False,
    window: int | None = None,
    segment_ids: Int[Array, "B N"] | None = None,
    stored_segment_ids: Int[Array, "B M"] | None = None,
    mask: Bool[Array, "B *N M"] | None = None,
) -> Bool[Array, "B *N M"] | None:
    """Returns what the operation's arguments say as its argument `mask`; None: all is visible."""
    if mask is not None:
        return mask
    reach = Reach(causal, window)
    sight = resolve(reach, Sight(None, segment_ids, stored_segment_ids), states, patterns)
    shown = visible(reach, sight, patterns)
    return None if shown is None else jnp.broadcast_to(shown, (batch, states, patterns))
