"""The n-gram baselines of an evaluation, against a slow count and against a source of known entropy."""

import collections

import numpy as np
import pytest

from engrax.evals import ngrams


def markov_bytes(length, symbols, seed):
    """(bytes of an order-2 source over a few letters, its entropy in bits per symbol)."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(0).dirichlet(np.full(symbols, 0.5), size=(symbols, symbols))
    found, draws, sums = [0, 0], rng.random(length), np.cumsum(table, axis=-1)
    for draw in draws:
        found.append(min(int(np.searchsorted(sums[found[-2], found[-1]], draw)), symbols - 1))
    states = np.array(found[:-2]), np.array(found[1:-1])
    entropy = -np.mean(np.log2(table[states[0], states[1], np.array(found[2:])]))
    return np.array(found[2:]), entropy


def random_rows(rng, rows, length, vocab):
    segments = np.sort(rng.integers(0, 3, (rows, length)), axis=1)
    segments[0] = 0  # a row of one segment: its start must not look around at its end
    targets = np.where(rng.random((rows, length)) < 0.2, -1, rng.integers(0, vocab, (rows, length)))
    return rng.integers(0, vocab, (rows, length)).astype(np.int32), targets.astype(np.int32), segments.astype(np.int32)


def contexts(tokens, targets, segments, order):
    """Yields (row, place, tokens before the target, newest last, at most `order`, in its segment)."""
    for i, j in zip(*np.nonzero(targets >= 0)):
        first = max([s for s in range(j + 1) if s == 0 or segments[i, s - 1] != segments[i, j]], default=0)
        yield i, j, tuple(tokens[i, max(first, j + 1 - order) : j + 1])


def slow_probabilities(train_rows, rows, vocab, order):
    """Witten-Bell by the formula, one target at a time."""
    counts = collections.defaultdict(collections.Counter)
    for i, j, before in contexts(*train_rows, order):
        for k in range(len(before) + 1):
            counts[before[len(before) - k :]][train_rows[1][i, j]] += 1
    found = np.ones((order + 1, *rows[1].shape))
    for i, j, before in contexts(*rows, order):
        p = 1 / vocab
        for k in range(order + 1):
            if k <= len(before):
                seen = counts.get(before[len(before) - k :], {})
                if seen:
                    p = (seen.get(rows[1][i, j], 0) + len(seen) * p) / (sum(seen.values()) + len(seen))
            found[k, i, j] = p
    return found


@pytest.mark.parametrize("vocab", [5, 300])  # keys of 32 and of 64 bits
def test_ngrams_equal_a_slow_count(vocab):
    rng = np.random.default_rng(vocab)
    train_rows, rows = random_rows(rng, 12, 40, vocab), random_rows(rng, 5, 40, vocab)
    model = ngrams.NGrams(*train_rows, vocab_size=vocab, order=3)
    np.testing.assert_allclose(model.probabilities(*rows), slow_probabilities(train_rows, rows, vocab, 3), rtol=1e-12)


def test_ngram_probabilities_sum_to_one():
    rng = np.random.default_rng(1)
    model = ngrams.NGrams(*random_rows(rng, 10, 30, 4), vocab_size=4, order=3)
    tokens = np.tile(rng.integers(0, 4, (1, 5)).astype(np.int32), (4, 1))
    targets = np.full((4, 5), -1, np.int32)
    targets[:, 4] = np.arange(4)
    total = model.probabilities(tokens, targets, np.zeros((4, 5), np.int32))[:, :, 4].sum(axis=1)
    np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_ngrams_reach_the_entropy_of_a_markov_source():
    letters, _ = markov_bytes(60_000, 6, 1)
    fresh, entropy = markov_bytes(20_000, 6, 2)
    as_rows = lambda x: (x[None, :-1], x[None, 1:], np.zeros((1, len(x) - 1), int))  # noqa: E731
    model = ngrams.NGrams(*as_rows(letters), vocab_size=256, order=3)
    bits = -np.log2(model.probabilities(*as_rows(fresh))).mean(axis=(1, 2))
    assert entropy - 0.005 < bits[2] < entropy + 0.01
    assert bits[1] > bits[2] + 0.05 and bits[0] > bits[1] + 0.05 and bits[2] < bits[3] < bits[2] + 0.03


def test_the_highest_order_fits_64_bits():
    assert [ngrams.highest_order(v) for v in (256, 65_536, 65_537, 200_000)] == [3, 3, 2, 2]
