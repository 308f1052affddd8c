"""Counter-based random numbers in numpy: a pure function of integer keys, the same on every machine and version.

numpy's generators are streams: the n-th number costs n draws or a separate generator, and distributions may change
between numpy versions. Here number (key, i, j) is SplitMix64's output function (Steele, Lea and Flood, 2014), applied
once per key to whole arrays of i and j. Random access and resuming need no state.
"""

import numpy as np
from jaxtyping import Float64, Int64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def bits(*keys) -> UInt64[np.ndarray, "..."]:
    """Returns 64 random bits for every combination of the integer keys (broadcast against each other; at least 1-d)."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = (state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys) -> Float64[np.ndarray, "..."]:
    """Returns uniform numbers in the open interval (0, 1), one per combination of the keys."""
    return ((bits(*keys) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def integers(count: int, *keys) -> Int64[np.ndarray, "..."]:
    """Returns uniform integers in [0, count), one per combination of the keys."""
    return (bits(*keys) % np.uint64(count)).astype(np.int64)


def permutation(length: int, *keys: int) -> Int64[np.ndarray, "length"]:
    """Returns a random permutation of range(length), determined by the keys."""
    return np.argsort(bits(*keys, np.arange(length)), kind="stable")


def seed32(*keys: int) -> int:
    """Returns a 32-bit seed for a library."""
    return int(bits(*keys)[0] >> np.uint64(32))
