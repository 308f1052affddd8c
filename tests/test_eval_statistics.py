"""Means, their intervals and the bins by position, against plain loops and repeated draws."""

import numpy as np
import pytest

from engrax.evals import statistics


def test_by_position_is_the_plain_mean_of_each_bin():
    rng = np.random.default_rng(0)
    values, counts = rng.random((7, 20)), (rng.random((7, 20)) < 0.7).astype(float)
    positions = np.broadcast_to(np.arange(20), (7, 20))
    edges = statistics.log_bins(20)
    assert edges[0] == 0 and edges[-1] == 20 and (np.diff(edges) > 0).all()
    for b in statistics.by_position(values * counts, counts, positions, edges):
        inside = slice(b["from"], b["to"])
        assert b["value"] == pytest.approx((values * counts)[:, inside].sum() / counts[:, inside].sum())
        assert b["tokens"] == counts[:, inside].sum()


def test_intervals_cover_the_truth_as_often_as_they_say():
    """Rows of unequal length whose tokens share a row effect: an interval over tokens would cover far less."""
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        counts = (np.arange(30) < rng.integers(10, 31, (60, 1))).astype(float)
        values = (rng.normal(0, 1, (60, 1)) + rng.normal(0, 1, (60, 30))) * counts
        found = statistics.mean(values, counts)
        covered += found.low <= 0 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_intervals_of_few_rows_cover_the_truth_too():
    """When there are three rows, then the interval is Student's: a normal one would cover the truth in 80 of 100."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(1000):
        found = statistics.mean(rng.normal(0, 1, (3, 1)), np.ones((3, 1)))
        covered += found.low <= 0 <= found.high
    assert 0.93 <= covered / 1000 <= 0.97, covered
    by_position = statistics.by_position(
        np.array([[1.0], [2.0]]), np.ones((2, 1)), np.zeros((2, 1), int), np.array([0, 1])
    )[0]
    half = 12.706 * np.std([1.0, 2.0], ddof=1) / 2**0.5
    assert (by_position["low"], by_position["high"]) == pytest.approx((1.5 - half, 1.5 + half), rel=1e-4)


@pytest.mark.parametrize("truth", [0.02, 0.5, 0.97])
def test_intervals_of_accuracies_cover_the_truth_near_the_ends_too(truth):
    """Rows whose answers are right together: an interval over answers would be too narrow."""
    rng, covered = np.random.default_rng(2), 0
    for _ in range(500):
        easy = rng.random((500, 1)) < truth
        hits = np.where(rng.random((500, 8)) < 0.5, easy, rng.random((500, 8)) < truth)
        found = statistics.proportion(hits, np.ones((500, 8)))
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 500 <= 0.98, covered


def test_intervals_of_accuracies_are_not_empty_where_all_or_none_are_right():
    """Wilson's: of 50 rows without a hit, the truth may be t^2 / (50 + t^2)."""
    counts, t = np.ones((50, 4)), 2.00958
    none, every = (statistics.proportion(np.full((50, 4), hit), counts) for hit in (0, 1))
    assert (none.value, none.low, none.high) == pytest.approx((0, 0, t**2 / (50 + t**2)), abs=1e-5)
    assert (every.value, every.low, every.high) == pytest.approx((1, 1 - none.high, 1))
    assert statistics.proportion(np.ones((1, 4)), np.ones((1, 4))).low is None


def test_context_positions_start_anew_with_each_segment():
    segments = np.array([[0, 0, 0, 1, 1, 2], [4, 4, 4, 4, -1, -1]])
    np.testing.assert_array_equal(statistics.context_positions(segments), [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 1]])
