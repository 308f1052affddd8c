"""MQAR: the generator against its definition, the oracle, guessers, the loader and the TFDS builder."""

import dataclasses
import itertools
import time

import numpy as np
import pytest

from engrax.data import DATASETS, MQAR, Loader
from engrax.errors import UserError

TASKS = [
    MQAR(),
    MQAR(seq_len=32, num_pairs=8, vocab_size=18),  # no room to spare: every slot is a query, every key is used
    MQAR(seq_len=48, num_pairs=3, vocab_size=33, num_passes=3, power_a=1.0, random_non_queries=False),
    MQAR(seq_len=128, num_pairs=1, vocab_size=4, seed=7),
]


def examples(task, split="train", count=500):
    return task.generate(split, np.arange(count))


@pytest.mark.parametrize("task", TASKS, ids=range(len(TASKS)))
def test_every_example_obeys_the_definition(task):
    tokens, targets = examples(task)
    half, context = task.vocab_size // 2, 2 * task.num_pairs * task.num_passes
    for row, target in zip(tokens, targets):
        keys, values = row[: 2 * task.num_pairs : 2], row[1 : 2 * task.num_pairs : 2]
        assert len(set(keys)) == len(set(values)) == task.num_pairs
        assert keys.min() >= 1 and keys.max() < half and values.min() >= half and values.max() < task.vocab_size
        np.testing.assert_array_equal(row[:context], np.tile(row[: 2 * task.num_pairs], task.num_passes))
        asked = np.flatnonzero(target >= 0)
        assert sorted(row[asked]) == sorted(keys)  # every key is asked exactly once
        assert (asked >= context).all() and (asked % 2 == 0).all()
        assert dict(zip(row[asked], target[asked])) == dict(zip(keys, values))  # the label stands at the key's place
        if not task.random_non_queries:
            assert not np.delete(row[context:], asked - context).any()
    assert tokens.dtype == targets.dtype == np.int32


@pytest.mark.parametrize("task", TASKS, ids=range(len(TASKS)))
def test_the_oracle_scores_100_percent(task):
    tokens, targets = examples(task)
    assert (task.solve(tokens) == targets)[targets >= 0].all()


@pytest.mark.parametrize("task", TASKS, ids=range(len(TASKS)))
def test_guessers_score_chance(task):
    tokens, targets = examples(task, count=4000)
    asked, rng = targets >= 0, np.random.default_rng(0)
    guess = rng.integers(task.vocab_size // 2, task.vocab_size, tokens.shape)
    values = tokens[:, 1 : 2 * task.num_pairs : 2]
    from_context = np.take_along_axis(values, rng.integers(0, task.num_pairs, tokens.shape), axis=1)
    for chance, prediction in (
        (task.chance, guess),
        (task.chance, np.full_like(tokens, task.vocab_size - 1)),  # a constant
        (task.chance_in_context, from_context),
    ):
        hits = (prediction == targets)[asked]
        assert abs(hits.mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / hits.size) + 1e-9


def test_query_slots_follow_the_power_law():
    task = MQAR(seq_len=24, num_pairs=1, power_a=0.3)
    _, targets = examples(task, count=40_000)
    slots = (np.nonzero(targets >= 0)[1] - 2) // 2
    weights = np.arange(1, 12) ** (0.3 - 1)
    np.testing.assert_allclose(np.bincount(slots, minlength=11) / 40_000, weights / weights.sum(), atol=0.012)


def test_keys_values_places_and_filler_are_independent():
    task = MQAR(seq_len=16, num_pairs=2, vocab_size=12)
    tokens, targets = examples(task, count=30_000)
    slot = (np.nonzero(targets[:, 4:] >= 0)[1].reshape(-1, 2)[:, 0]) // 2  # of whichever key is asked first
    key1, value1, key2, value2, last = tokens[:, 0], tokens[:, 1], tokens[:, 2], tokens[:, 3], tokens[:, -1]
    pairs = [(key1, value1), (key1, value2), (key2, value2), (value1, last), (slot, value1), (slot, key1)]
    pairs += [(key1[1:], key1[:-1]), (value1[1:], key1[:-1])]  # and neighbouring examples
    for a, b in pairs:
        counts = np.zeros((a.max() + 1, b.max() + 1))
        np.add.at(counts, (a, b), 1)
        expected = counts.sum(1, keepdims=True) * counts.sum(0, keepdims=True) / len(a)
        used = expected > 0
        freedom = ((counts.sum(1) > 0).sum() - 1) * ((counts.sum(0) > 0).sum() - 1)
        chi2 = ((counts - expected)[used] ** 2 / expected[used]).sum()
        assert chi2 < freedom + 5 * np.sqrt(2 * freedom)


def test_an_example_depends_on_its_index_alone():
    task = TASKS[0]
    tokens, targets = examples(task)
    some = np.array([499, 3, 77, 3])
    for got, want in zip(task.generate("train", some), (tokens, targets)):
        np.testing.assert_array_equal(got, want[some])


def test_splits_and_seeds_share_no_example():
    task = MQAR(train_examples=20_000)
    rows = [row.tobytes() for row in examples(task, "train", 20_000)[0]]
    rows += [row.tobytes() for row in examples(task, "validation", 1_000)[0]]
    rows += [row.tobytes() for row in examples(dataclasses.replace(task, seed=1), "train", 1_000)[0]]
    assert len(set(rows)) == len(rows)


def test_generation_is_quick():
    MQAR().generate("train", np.arange(10))
    start = time.process_time()
    for block in range(20):
        MQAR().generate("train", np.arange(1000 * block, 1000 * (block + 1)))
    assert time.process_time() - start < 2.0


def test_loader_batches_are_the_generated_examples():
    task = MQAR(train_examples=10, validation_examples=10)
    loader = task.loader("validation", batch_size=4, epochs=1)
    assert isinstance(loader, Loader)
    batches = list(loader)
    assert [batch["tokens"].shape for batch in batches] == [(4, 64)] * 3
    joined = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    tokens, targets = task.generate("validation", np.arange(10))
    np.testing.assert_array_equal(joined["tokens"][:10], tokens)
    np.testing.assert_array_equal(joined["targets"][:10], targets)
    assert not joined["segment_ids"][:10].any()
    assert (joined["segment_ids"][10:] == -1).all() and (joined["targets"][10:] == -1).all()
    assert all(array.dtype == np.int32 for array in joined.values())


def test_every_epoch_shows_every_example_in_another_order():
    task = MQAR(train_examples=12)
    tokens, _ = task.generate("train", np.arange(12))
    names = {row.tobytes(): i for i, row in enumerate(tokens)}
    batches = itertools.islice(task.loader("train", batch_size=4, seed=3), 9)
    seen = [names[row.tobytes()] for batch in batches for row in batch["tokens"]]
    epochs = [seen[:12], seen[12:24], seen[24:]]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_restored_position_gives_the_same_batches():
    task = MQAR(train_examples=10)  # not a multiple of the batch: batches straddle epochs
    want = list(itertools.islice(task.loader("train", batch_size=4, seed=1), 12))
    for cut in (0, 1, 2, 5, 9):
        loader = task.loader("train", batch_size=4, seed=1)
        for _ in range(cut):
            next(loader)
        state = loader.get_state()
        fresh = task.loader("train", batch_size=4, seed=1)
        next(fresh)
        fresh.set_state(state)
        for batch in want[cut:]:
            np.testing.assert_equal(next(fresh), batch)


@pytest.mark.parametrize("epochs", [None, 1])
def test_two_processes_together_are_one(epochs):
    task = MQAR(validation_examples=9)
    one = task.loader("validation", batch_size=4, seed=5, epochs=epochs)
    two = [
        task.loader("validation", batch_size=4, seed=5, epochs=epochs, process_index=i, process_count=2) for i in (0, 1)
    ]
    for whole in itertools.islice(one, 6):
        parts = [next(loader) for loader in two]
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])
    if epochs:
        assert [list(loader) for loader in two] == [[], []]


def test_digest_tells_tasks_apart():
    tasks = [*TASKS, dataclasses.replace(TASKS[0], seed=1), dataclasses.replace(TASKS[0], power_a=0.02)]
    assert len({task.digest() for task in tasks}) == len(tasks)
    assert MQAR().digest() == DATASETS["mqar"]().digest()
    assert MQAR().tokenizer is None


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(num_pairs=0), "num_pairs must be at least 1"),
        (dict(seq_len=63), "must be even"),
        (dict(seq_len=14), "needs at least 16 tokens"),
        (dict(seq_len=30, num_passes=3), "needs at least 32 tokens"),
        (dict(vocab_size=9), "choose a vocab_size of at least 10"),
        (dict(power_a=0.0), "power_a must be positive"),
        (dict(num_passes=0), "num_passes"),
        (dict(train_examples=0), "train_examples"),
        (dict(validation_examples=0), "validation_examples"),
        (dict(seed=-1), "seed"),
    ],
)
def test_impossible_tasks_are_refused(fields, sentence):
    with pytest.raises(UserError, match=sentence):
        MQAR(**fields)


def test_the_smallest_possible_tasks_are_accepted():
    MQAR(seq_len=16), MQAR(seq_len=32, num_passes=3), MQAR(vocab_size=10)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (dict(split="test"), "unknown split 'test'"),
        (dict(batch_size=3, process_count=2), "does not divide"),
        (dict(batch_size=0), "batch_size must be positive"),
        (dict(process_index=1), "process_index"),
        (dict(epochs=0), "epochs"),
        (dict(seed=-1), "seed"),
        (dict(align=5), "not a multiple of align 5"),
    ],
)
def test_wrong_loader_arguments_are_refused(arguments, sentence):
    arguments = {"split": "train", "batch_size": 4, **arguments}
    with pytest.raises(UserError, match=sentence):
        MQAR().loader(arguments.pop("split"), **arguments)


def test_tfds_builder_round_trip(tmp_path):
    import tensorflow_datasets as tfds

    from engrax.data.tfds_tasks import build

    task = MQAR(num_pairs=2, train_examples=1500, validation_examples=20)
    name = build(task, str(tmp_path))
    assert build(task, str(tmp_path)) == name  # already there
    for split, count in (("train", 1500), ("validation", 20)):
        source = tfds.data_source(name, split=split, data_dir=tmp_path, download=False)
        records = source.__getitems__(range(len(source)))
        assert [record["index"] for record in records] == list(range(count))
        tokens, targets = task.generate(split, np.arange(count))
        np.testing.assert_array_equal([record["tokens"] for record in records], tokens)
        np.testing.assert_array_equal([record["targets"] for record in records], targets)
