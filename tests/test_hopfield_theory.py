"""What is known of modern Hopfield networks (arXiv 2008.02217), held against `hopfield_retrieval`.

Sampled figures are compared with those found by an independent program on its own samples, within the error of both.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import hopfield_energy, hopfield_retrieval

DRAWN = 400  # states per figure; three standard errors of a share are at most 0.075


def retrieve(state, stored, **options):
    """Retrieves with one row and one head: state [N, D], stored [M, D]."""
    state, stored = (jnp.asarray(x)[None, :, None] for x in (state, stored))
    return np.asarray(hopfield_retrieval(state, stored, **options))[0, :, 0]


def energy(state, stored, **options):
    state, stored = (jnp.asarray(x)[None, :, None] for x in (state, stored))
    return np.asarray(hopfield_energy(state, stored, **options))[0, :, 0]


def weights(state, stored, **options):
    values = jnp.eye(len(stored), dtype=jnp.asarray(stored).dtype)[None, :, None]
    state, stored = (jnp.asarray(x)[None, :, None] for x in (state, stored))
    return np.asarray(hopfield_retrieval(state, stored, values, **options))[0, :, 0]


def on_sphere(rng, count, width, radius):
    x = rng.normal(size=(count, width))
    return (radius * x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def separations(x):
    """Delta_i = |x_i|^2 - max_{j != i} x_i . x_j."""
    gram = x.astype(np.float64) @ x.astype(np.float64).T
    return np.diag(gram) - np.where(np.eye(len(x), dtype=bool), -np.inf, gram).max(1)


def test_beta_zero_gives_the_mean_and_large_beta_the_nearest(x64):
    rng = np.random.default_rng(0)
    x, xi = rng.normal(size=(30, 16)), rng.normal(size=(9, 16))
    np.testing.assert_allclose(retrieve(xi, x, beta=0.0), np.tile(x.mean(0), (9, 1)), atol=1e-12)
    np.testing.assert_allclose(retrieve(xi, x, beta=1e4), x[(xi @ x.T).argmax(1)], atol=1e-9)


@pytest.mark.parametrize("beta", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("separation, similarity", [("softmax", "dot"), ("sparsemax", "dot"), ("entmax", "l2")])
def test_energy_never_rises(separation, similarity, beta):
    """100 states, 20 updates, 16 features, float32: no update raises the energy by more than 5e-6."""
    rng = np.random.default_rng(1)
    x, xi = (rng.normal(size=(n, 16)).astype(np.float32) / 4 for n in (30, 100))
    options = dict(beta=beta, separation=separation, similarity=similarity)
    found = []
    for _ in range(21):
        found.append(energy(xi, x, **options))
        xi = retrieve(xi, x, **options)
    assert np.diff(found, axis=0).max() <= 5e-6
    assert np.mean(found[0] - found[-1]) > 0.01


@pytest.mark.parametrize("width", [16, 32, 64])
def test_retrieval_bound(width, x64):
    """|f(x_i) - x_i| <= 2 (N - 1) exp(-beta Delta_i) M for every pattern."""
    x = on_sphere(np.random.default_rng(2), 1000, width, np.sqrt(width - 1)).astype(np.float64)
    for beta in (0.5, 1.0, 2.0):
        error = np.linalg.norm(retrieve(x, x, beta=beta) - x, axis=1)
        bound = 2 * 999 * np.exp(-beta * separations(x)) * np.sqrt(width - 1)
        assert np.all(error <= bound + 1e-12)
        if width == 64 and beta == 0.5:
            assert bound.max() < 0.1 * np.sqrt(width - 1) and error.max() > 0  # it says something


@pytest.mark.parametrize(
    "width, patterns, noise, share",
    [(16, 1000, 0, 0.95), (16, 10_000, 0, 0.0), (24, 10_000, 0, 1.0), (16, 1000, 0.5, 0.26), (24, 10_000, 0.5, 0.84)]
    + [pytest.param(32, 10_000, 0.5, 1.0, marks=pytest.mark.deep)],
)
def test_capacity(width, patterns, noise, share):
    """Patterns on a sphere of radius sqrt(d - 1), beta 1, retrieved to 5 %: the transition lies where it should."""
    rng, radius = np.random.default_rng(3), np.sqrt(width - 1)
    x = on_sphere(rng, patterns, width, radius)
    noisy = (x[:DRAWN] + noise * rng.normal(size=(DRAWN, width))).astype(np.float32)
    right = np.linalg.norm(retrieve(noisy, x, beta=1.0) - x[:DRAWN], axis=1) < 0.05 * radius
    error = 3 * np.sqrt(2 * max(share * (1 - share), 0.003) / DRAWN)
    assert abs(right.mean() - share) <= error, right.mean()


def clusters(rng, spread=1.0):
    """4 clusters of 16 patterns, 32 features."""
    return (rng.normal(size=(4, 1, 32)) + spread * rng.normal(size=(4, 16, 32))).reshape(64, 32).astype(np.float32)


def holding(p, share=0.9):
    """How many patterns hold that share of the weight."""
    return 1 + (np.cumsum(-np.sort(-p, axis=1), axis=1) < share).sum(1)


def test_three_regimes():
    """At a low beta one state near the mean, at a middle one averages of a cluster, at a high one single patterns."""
    x = clusters(np.random.default_rng(4))
    found = {beta: holding(weights(x, x, beta=beta)) for beta in (0.01, 0.1, 1.0)}
    assert 55 <= found[0.01].mean() <= 58  # all 64 alike would be 58
    assert 12 <= found[0.1].mean() <= 20  # the cluster has 16
    assert np.all(found[1.0] == 1)
    rest = retrieve(x, x, beta=0.01, steps=None)
    assert np.linalg.norm(rest - x.mean(0), axis=1).max() < 0.2 * np.linalg.norm(x, axis=1).mean()
    assert np.ptp(rest, axis=0).max() < 1e-2


def test_contraction_has_one_fixed_point(x64):
    """beta max |x_i - m|^2 < 1: whatever the start, the same rest. Above, there are several."""
    rng = np.random.default_rng(5)
    x = rng.normal(size=(20, 8))
    beta = 0.95 / (np.linalg.norm(x - x.mean(0), axis=1) ** 2).max()
    starts = 5 * rng.normal(size=(50, 8))
    rest = dict(steps=None, tolerance=1e-13, max_steps=1000)
    assert np.ptp(retrieve(starts, x, beta=beta, **rest), axis=0).max() < 1e-9
    assert np.ptp(retrieve(starts, x, beta=20 * beta, **rest), axis=0).max() > 0.1


@pytest.mark.parametrize("separation, alpha", [("sparsemax", 2.0), ("entmax", 1.5)])
def test_sparse_separations_retrieve_exactly(separation, alpha):
    """beta Delta >= 1 / (alpha - 1): one update gives the pattern itself, every bit; a little below, it does not."""
    x = on_sphere(np.random.default_rng(6), 200, 24, np.sqrt(23))
    margin, delta = 1 / (alpha - 1), separations(x)
    nearest = int(delta.argmin())
    enough, short = 1.001 * margin / delta.min(), 0.9 * margin / delta.min()
    options = dict(separation=separation, alpha=alpha)
    np.testing.assert_array_equal(retrieve(x, x, beta=enough, **options), x)
    p = weights(x[nearest : nearest + 1], x, beta=short, **options)
    assert p[0, nearest] < 1 and (p > 0).sum() == 2
    assert not np.array_equal(retrieve(x, x, beta=enough), x)  # softmax never does


def test_similarities_differ(x64):
    """Patterns of [0, 1]^64, half of the query erased, beta 8: Manhattan distance finds 99 % of 500, dot far fewer."""
    x = np.random.default_rng(7).random((500, 64))
    query = np.where(np.arange(64) < 32, x, 0)
    right = {}
    for similarity in ("dot", "l2", "l1"):
        found = retrieve(query, x, beta=8.0, similarity=similarity)
        right[similarity] = np.mean(np.linalg.norm(found - x, axis=1) < 0.05 * np.linalg.norm(x, axis=1))
    assert right["l1"] > 0.96 and right["dot"] < right["l1"] - 0.3 and right["l2"] < right["l1"] - 0.3


def test_duplicates_weigh_twice_and_order_does_not_matter(x64):
    rng = np.random.default_rng(8)
    x, xi = rng.normal(size=(9, 5)), rng.normal(size=(4, 5))
    wanted = retrieve(xi, x, beta=1.0, steps=3)
    np.testing.assert_allclose(retrieve(xi, x[rng.permutation(9)], beta=1.0, steps=3), wanted, rtol=1e-12)
    p = weights(xi, x, beta=1.0) * np.where(np.arange(9) == 2, 2, 1)
    twice = retrieve(xi, np.concatenate([x, x[2:3]]), beta=1.0)
    np.testing.assert_allclose(twice, p / p.sum(1, keepdims=True) @ x, rtol=1e-12)
