"""Means with their uncertainty, in total and by position. Rows are the unit of resampling: rows are treated as
independent, tokens of a row are not."""

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval; the interval is None with fewer than two rows."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        """For results.json."""
        return dataclasses.asdict(self)


def mean(sums: Shaped[np.ndarray, "N T"], counts: Shaped[np.ndarray, "N T"]) -> Estimate:
    """sum(sums) / sum(counts) with the linearised standard error of a ratio over rows (Cochran 1977, eq. 6.13).

    The interval is Student's, with one degree of freedom less than the number of rows.
    """
    row_sums, row_counts = np.sum(sums, axis=1, dtype=np.float64), np.sum(counts, axis=1, dtype=np.float64)
    return _ratio(row_sums, row_counts)


def proportion(hits: Shaped[np.ndarray, "N T"], counts: Shaped[np.ndarray, "N T"]) -> Estimate:
    """sum(hits) / sum(counts) for hits of 0 and 1, with Wilson's interval, which is inside [0, 1] and not empty at its
    ends.

    Its number of trials is the effective one, p (1 - p) / (standard error of `mean`)^2 (Korn and Graubard 1998), at
    most the number of counts. If all or none are hits, the error of `mean` is 0, and it is the number of rows.
    """
    row_hits, row_counts = np.sum(hits, axis=1, dtype=np.float64), np.sum(counts, axis=1, dtype=np.float64)
    rows, plain = int((row_counts > 0).sum()), _ratio(row_hits, row_counts)
    if plain.low is None:
        return plain
    p, t = plain.value, half_width(rows)
    error = (plain.high - plain.value) / t
    trials = min(p * (1 - p) / error**2, row_counts.sum()) if error > 0 and 0 < p < 1 else rows
    middle = (p + t**2 / (2 * trials)) / (1 + t**2 / trials)
    half = t * np.sqrt(p * (1 - p) / trials + t**2 / (4 * trials**2)) / (1 + t**2 / trials)
    return Estimate(p, float(max(middle - half, 0.0)), float(min(middle + half, 1.0)))


def mean_of_few(values: Float[np.ndarray, " N"]) -> Estimate:
    """The mean of a few independent numbers, with Student's interval."""
    n, value = len(values), float(np.mean(values))
    if n < 2:
        return Estimate(value, None, None)
    half = half_width(n) * float(np.std(values, ddof=1)) / n**0.5
    return Estimate(value, value - half, value + half)


@functools.cache
def half_width(rows: int) -> float:
    """Half of a 95 % interval in standard errors of a mean over this many rows: 12.7 for two, 1.96 for very many."""
    from scipy.stats import t

    return float(t.ppf(0.975, rows - 1))


def _ratio(row_sums: Float[np.ndarray, " N"], row_counts: Float[np.ndarray, " N"]) -> Estimate:
    used = row_counts > 0
    row_sums, row_counts, rows = row_sums[used], row_counts[used], int(used.sum())
    if not rows:
        return Estimate(float("nan"), None, None)
    value = float(row_sums.sum() / row_counts.sum())
    if rows < 2:
        return Estimate(value, None, None)
    error = np.sqrt(rows / (rows - 1) * np.sum((row_sums - value * row_counts) ** 2)) / row_counts.sum()
    half = half_width(rows) * float(error)
    return Estimate(value, value - half, value + half)


def log_bins(length: int, per_octave: int = 3) -> Int[np.ndarray, " edges"]:
    """Edges 0 < 1 < ... <= length of position bins whose widths grow with the position."""
    edges = 2.0 ** np.arange(0, np.log2(max(length, 2)) + 1e-9, 1 / per_octave)
    return np.unique(np.concatenate([[0], np.round(edges), [length]]).astype(int))


def even_bins(first: int, last: int, bins: int = 12) -> Int[np.ndarray, " edges"]:
    """Edges of at most `bins` bins of about equal width over positions first .. last."""
    return np.unique(np.linspace(first, last + 1, min(bins, last + 1 - first) + 1).round().astype(int))


def by_position(
    sums: Shaped[np.ndarray, "N T"],
    counts: Shaped[np.ndarray, "N T"],
    positions: Int[np.ndarray, "N T"],
    edges: Int[np.ndarray, " edges"],
) -> list[dict[str, Any]]:
    """For every non-empty bin of `positions`: {"from", "to" (exclusive), "tokens", "value", "low", "high"}."""
    rows, bins = len(sums), len(edges) - 1
    place = np.digitize(positions, edges) - 1
    inside = (place >= 0) & (place < bins) & (counts > 0)
    cell = (np.arange(rows)[:, None] * bins + place)[inside]
    shape = (rows, bins)
    row_sums = np.bincount(cell, weights=sums[inside], minlength=rows * bins).reshape(shape)
    row_counts = np.bincount(cell, weights=counts[inside], minlength=rows * bins).reshape(shape)
    tokens = np.bincount(place[inside], minlength=bins)
    return [
        {"from": int(edges[b]), "to": int(edges[b + 1]), "tokens": int(tokens[b])}
        | _ratio(row_sums[:, b], row_counts[:, b]).to_dict()
        for b in range(bins)
        if tokens[b]
    ]


def context_positions(segment_ids: Int[np.ndarray, "N T"]) -> Int[np.ndarray, "N T"]:
    """Each token's place within its segment, from 0."""
    places = np.broadcast_to(np.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = np.ones(segment_ids.shape, bool)
    begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    return places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
