"""Bit patterns, latch and digits: the generators against their definitions, and their oracles."""

import dataclasses

import numpy as np
import pytest

from engrax.data import DATASETS, BitPatterns, Latch, load_digits
from engrax.errors import UserError

BAGS = [BitPatterns(), BitPatterns(instances=5, bits=3, signals=3, signals_per_bag=2, seed=4)]
ROWS = [Latch(), Latch(seq_len=5, classes=3, vocab_size=4, seed=2)]


@pytest.mark.parametrize("task", BAGS, ids=range(2))
def test_bags_obey_the_definition(task):
    bags, labels = task.generate("train", np.arange(1000))
    assert bags.shape == (1000, task.instances, task.bits) and set(np.unique(bags)) == {0, 1}
    codes = np.sum(bags.astype(int) << np.arange(task.bits), axis=-1)
    signals, others = task.codes
    assert len(signals) == task.signals and sorted([*signals, *others]) == list(range(2**task.bits))
    is_signal = np.isin(codes, signals)
    assert np.array_equal(is_signal.sum(1), np.where(labels, task.signals_per_bag, 0))
    for row in codes[labels]:
        found = row[np.isin(row, signals)]
        assert len(set(found)) == len(found)
    assert set(codes[is_signal]) == set(signals)  # every signal is used
    assert is_signal[labels].any(0).all()  # at every place
    assert abs(labels.mean() - task.chance) < 0.06
    assert np.array_equal(task.solve(bags), labels)


def test_a_bag_is_a_function_of_seed_split_and_index():
    task = BAGS[0]
    bags, labels = task.generate("train", np.array([7, 3, 7]))
    assert np.array_equal(bags[0], bags[2]) and labels[0] == labels[2]
    assert np.array_equal(task.generate("train", np.array([3]))[0][0], bags[1])
    assert not np.array_equal(task.generate("validation", np.array([7]))[0][0], bags[0])
    assert not np.array_equal(dataclasses.replace(task, seed=1).generate("train", np.array([7]))[0][0], bags[0])


@pytest.mark.parametrize("task", ROWS, ids=range(2))
def test_latch_rows_obey_the_definition(task):
    tokens, targets = task.generate("train", np.arange(600))
    assert tokens.shape == (600, task.seq_len) and tokens.dtype == np.int32
    assert set(tokens[:, 0]) == set(range(task.classes))
    assert set(tokens[:, 1:].ravel()) == set(range(task.classes, task.vocab_size))
    assert np.array_equal(targets[:, -1], tokens[:, 0]) and np.all(targets[:, :-1] == -1)
    assert np.array_equal(task.solve(tokens)[targets >= 0], targets[targets >= 0])
    assert abs(np.mean(targets[:, -1] == 0) - task.chance) < 0.1


def test_latch_has_the_loaders_of_a_data_set():
    task = DATASETS["latch"](train_examples=50, validation_examples=20)
    train = task.loader("train", batch_size=8, seed=1)
    first, state = next(train), train.get_state()
    second = next(train)
    again = task.loader("train", batch_size=8, seed=1)
    again.set_state(state)
    assert np.array_equal(next(again)["tokens"], second["tokens"])
    assert first["tokens"].shape == (8, 32) and np.all(first["segment_ids"] == 0)
    batches = list(task.loader("validation", batch_size=8, epochs=1))
    assert sum(int((b["targets"] >= 0).sum()) for b in batches) == 20  # the rest of the last batch is padding
    halves = [next(task.loader("train", batch_size=8, seed=1, process_index=i, process_count=2)) for i in (0, 1)]
    assert np.array_equal(np.concatenate([h["tokens"] for h in halves]), first["tokens"])
    assert task.digest() == DATASETS["latch"](train_examples=50, validation_examples=20).digest() != Latch().digest()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: BitPatterns(signals=256), r"signals must lie in \[1, 2 \*\* bits\), not 256"),
        (lambda: BitPatterns(signals_per_bag=9), r"signals_per_bag must lie in \[1, 8\], not 9"),
        (lambda: BitPatterns(bits=0), r"bits must lie in \[1, 16\], not 0"),
        (lambda: BitPatterns().generate("test", np.arange(2)), "unknown split 'test'"),
        (lambda: Latch(classes=1), r"classes must lie in \[2, vocab_size\), not 1 of 20"),
        (lambda: Latch(seed=-1), "seed must not be negative"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_digits():
    pytest.importorskip("sklearn")
    images, labels = load_digits()
    assert images.shape == (1797, 64) and images.min() == 0 and images.max() == 1 and set(labels) == set(range(10))


def test_digits_need_scikit_learn(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="pip install scikit-learn"):
        load_digits()
