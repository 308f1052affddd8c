"""Packing and the text pipeline: nothing lost, nothing twice, nothing across documents, any position restorable."""

import itertools
import json
import time

import numpy as np
import pytest

from engrax.data.config import Share
from engrax.data.encoded import Encoded
from engrax.data.packing import plan_rows
from engrax.data.pipeline import PackedText
from engrax.errors import UserError

T = 32


def some_documents(count=150, seed=0):
    """Documents of 0 to 5 rows; every token value occurs once in all of them together, so pieces are traceable."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, T, count) * rng.integers(1, 6, count)
    lengths[:6] = [0, 1, T - 1, T, T + 1, 3 * T]
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.int32) for end, length in zip(ends, lengths)]


def pack(documents, *, batch_size=4, seed=0, epochs=None, align=1, buffer_tokens=900, index=0, count=1, seq_len=T):
    return PackedText(
        documents,
        lambda document: Encoded(document, np.ones_like(document)),
        seq_len=seq_len,
        share=Share.of(batch_size, index, count),
        seed=seed,
        epochs=epochs,
        align=align,
        buffer_tokens=buffer_tokens,
    )


def one_epoch(loader, total):
    """Returns the stacked batches of the first epoch of an endless loader: until every token was seen."""
    batches, seen = [], 0
    while seen < total:
        batches.append(next(loader))
        seen += int((batches[-1]["segment_ids"] >= 0).sum())
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def segments(batch):
    """Yields (row, offset, tokens, targets) of every segment of the stacked batch."""
    for row, ids in enumerate(batch["segment_ids"]):
        for segment in range(ids.max() + 1):
            places = np.flatnonzero(ids == segment)
            assert (np.diff(places) == 1).all() and len(places)
            yield row, places[0], batch["tokens"][row, places], batch["targets"][row, places]


@pytest.mark.parametrize("align", [1, 4, 32])
@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("buffer_tokens", [1, 900, 10**9])
def test_every_document_exactly_once_per_epoch(align, epochs, buffer_tokens):
    documents = some_documents()
    total = sum(map(len, documents))
    loader = pack(documents, align=align, epochs=epochs, buffer_tokens=buffer_tokens, batch_size=1)
    batch = one_epoch(loader, total)
    pieces = sorted((tokens.tolist() for _, _, tokens, _ in segments(batch)), key=lambda piece: piece[0])
    assert list(itertools.chain(*pieces)) == list(range(total))  # all tokens, once, in order
    want = [document[start : start + T].tolist() for document in documents for start in range(0, len(document), T)]
    assert pieces == want  # a document is cut at whole rows alone: one that fits into a row is never cut
    if epochs:
        assert next(loader, None) is None
    else:  # the second epoch begins with the next row
        again = one_epoch(loader, total)
        assert sorted(again["tokens"][again["segment_ids"] >= 0]) == list(range(total))


@pytest.mark.parametrize("align", [1, 4])
def test_targets_are_the_next_token_of_the_same_document(align):
    documents = some_documents()
    last = {int(document[-1]) for document in documents if len(document)}
    batch = one_epoch(pack(documents, align=align, batch_size=1), sum(map(len, documents)))
    used = []
    for _, _, tokens, targets in segments(batch):
        for token, target in zip(tokens.tolist(), targets.tolist()):
            assert target == (-1 if token in last else token + 1)
            used += [target] if target >= 0 else []
    firsts = {int(document[0]) for document in documents if len(document)}
    assert sorted(used) == sorted(set(range(sum(map(len, documents)))) - firsts)  # each predicted once, but the first
    padding = batch["segment_ids"] < 0
    assert (batch["targets"][padding] == -1).all() and not batch["tokens"][padding].any()


@pytest.mark.parametrize("align", [1, 4, 16, 32])
def test_segments_start_at_multiples_of_align(align):
    documents = some_documents()
    batch = one_epoch(pack(documents, align=align), sum(map(len, documents)))
    offsets = [offset for _, offset, _, _ in segments(batch)]
    assert all(offset % align == 0 for offset in offsets)
    assert align == 32 or any(offset for offset in offsets)
    for ids in batch["segment_ids"]:
        real = ids[ids >= 0]
        assert (np.diff(real) >= 0).all()
        assert set(real) == set(range(len(set(real))))
        end = np.flatnonzero(ids >= 0).max(initial=-1) + 1
        assert not (ids[:end] == -1).any() and (ids[end:] == -1).all()  # filler (-2) between documents, then padding
    assert align == 1 or align == 32 or (batch["segment_ids"] == -2).any()


def test_rows_are_well_filled():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 400, 3000)
    plan = plan_rows(lengths, 512)
    assert lengths.sum() / (plan.rows * 512) > 0.98
    aligned = plan_rows(lengths, 512, align=64)
    assert (-(-lengths // 64) * 64).sum() / (aligned.rows * 512) > 0.95


def test_planning_is_quick():
    lengths = np.random.default_rng(0).integers(1, 1000, 50_000)
    start = time.process_time()
    plan_rows(lengths, 512)
    assert time.process_time() - start < 3.0


@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("buffer_tokens", [900, 10**9])
def test_a_restored_position_gives_the_same_batches(epochs, buffer_tokens):
    documents = some_documents(40)
    options = dict(batch_size=4, seed=3, epochs=epochs, buffer_tokens=buffer_tokens)
    steps = 50 if epochs is None else 1000  # several epochs
    loader = pack(documents, **options)
    states, want = [loader.get_state()], []
    for batch in itertools.islice(loader, steps):
        want.append(batch)
        states.append(loader.get_state())
    assert states[-1]["document"] >= 40  # the first epoch was left behind
    reused = pack(documents, **options)
    for cut in [0, 1, 7, *range(len(want) // 2 - 3, len(want) // 2 + 3), len(want)]:
        state = json.loads(json.dumps(states[cut]))
        for loader in (pack(documents, **options), reused):
            loader.set_state(state)
            assert loader.get_state() == state
            for batch in want[cut : cut + 5]:
                np.testing.assert_equal(next(loader), batch)
            if epochs and cut == len(want):
                assert next(loader, None) is None


@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("count", [2, 4])
def test_processes_together_are_one(epochs, count):
    documents = some_documents(60)
    one = pack(documents, seed=2, epochs=epochs)
    many = [pack(documents, seed=2, epochs=epochs, index=i, count=count) for i in range(count)]
    for whole in itertools.islice(one, 60):
        parts = [next(loader) for loader in many]
        for key in whole:
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), whole[key])
        assert all(loader.get_state() == one.get_state() for loader in many)
    if epochs:
        assert all(next(loader, None) is None for loader in [one, *many])


def test_a_position_holds_for_another_number_of_processes_and_batch_size():
    documents = some_documents(60)
    loader = pack(documents, seed=2, batch_size=4)
    for _ in range(5):
        next(loader)
    want = next(pack_at(documents, loader.get_state(), batch_size=2))
    np.testing.assert_equal({key: value[:2] for key, value in next(loader).items()}, want)


def pack_at(documents, state, **options):
    loader = pack(documents, seed=2, **options)
    loader.set_state(state)
    return loader


def test_order_depends_on_seed_and_epoch():
    documents = some_documents(60)
    total = sum(map(len, documents))
    first = one_epoch(pack(documents, seed=0, batch_size=1), total)["tokens"]
    np.testing.assert_array_equal(one_epoch(pack(documents, seed=0, batch_size=1), total)["tokens"], first)
    loader = pack(documents, seed=1, batch_size=1)
    epochs = [one_epoch(loader, total)["tokens"] for _ in range(2)]
    for a, b in itertools.combinations([first, *epochs], 2):
        assert a.shape != b.shape or (a != b).any()


def test_groups_hold_other_documents_in_every_epoch():
    documents = [np.full(T, i, np.int32) for i in range(256)]  # a row each; a group is 64 documents
    groups = []
    for seed in (0, 1):
        loader = pack(documents, seed=seed, batch_size=64)
        groups += [frozenset(next(loader)["tokens"][:, 0].tolist()) for _ in range(12)]  # three epochs
    assert len(set(groups)) == len(groups) == 24
    assert all(len(frozenset.union(*groups[i : i + 4])) == 256 for i in range(0, 24, 4))


def test_rows_of_a_single_document_come_in_another_order_every_epoch():
    documents = [np.arange(20 * T, dtype=np.int32)]
    orders = []
    for seed in (0, 1):
        loader = pack(documents, seed=seed, batch_size=20)
        orders += [tuple(next(loader)["tokens"][:, 0] // T) for _ in range(2)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(20)) for order in orders)


def test_fixed_order_does_not_depend_on_the_seed_and_ends_with_padding():
    documents = some_documents(60)
    runs = [list(pack(documents, seed=seed, epochs=1)) for seed in (0, 1)]
    np.testing.assert_equal(runs[0], runs[1])
    rows = sum(int((batch["segment_ids"].max(axis=1) >= 0).sum()) for batch in runs[0])
    assert rows % 4 and len(runs[0]) == -(-rows // 4)  # the last batch is a partial one
    last = runs[0][-1]
    assert last["tokens"].shape == (4, T) and (last["segment_ids"][rows % 4 :] == -1).all()
    assert (last["targets"][rows % 4 :] == -1).all()


def test_a_batch_may_be_larger_than_the_data():
    batch = next(pack([np.arange(5, dtype=np.int32)], batch_size=8))
    assert (batch["segment_ids"][:, :5] == 0).all()  # 8 epochs of a single row


def test_documents_are_read_many_at_a_time_where_the_source_can():
    class Source(list):
        calls = 0

        def __getitems__(self, indices):
            self.calls += 1
            return [self[index] for index in indices]

    source = Source(some_documents(60))
    loader = pack(source, epochs=1, buffer_tokens=10**9)
    np.testing.assert_equal(list(loader), list(pack(list(source), epochs=1, buffer_tokens=10**9)))
    assert source.calls == 1


def test_a_large_source_is_not_read_whole_at_the_start():
    class Endless:
        reads = 0

        def __len__(self):
            return 30_000_000

        def __getitem__(self, index):
            self.reads += 1
            return np.full(10, index % 251, np.int32)

    source = Endless()
    loader = pack(source, buffer_tokens=1000)
    next(loader)
    loader.close()
    assert source.reads <= 3 * 128


def test_data_without_text_are_refused_and_foreign_positions_too():
    empty = np.zeros(0, np.int32)
    for epochs in (None, 1):
        with pytest.raises(UserError, match="every document is empty"):
            next(pack([empty] * 3, epochs=epochs, buffer_tokens=1))
    with pytest.raises(UserError, match="no documents"):
        pack([])
    with pytest.raises(UserError, match="does not belong to a text data set"):
        pack(some_documents()).set_state({"next_index": 3})


def test_sparse_documents_among_empty_ones_are_found():
    documents = [np.zeros(0, np.int32)] * 200 + [np.arange(3, dtype=np.int32)] + [np.zeros(0, np.int32)] * 200
    batches = list(itertools.islice(pack(documents, batch_size=1, buffer_tokens=1), 5))
    assert all((batch["tokens"][0, :3] == [0, 1, 2]).all() for batch in batches)
