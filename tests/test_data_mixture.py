"""Mixtures of texts: exact shares, positions, epochs, and users' mistakes."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from engrax.data import MQAR, Mixture, StdlibText, TextFolder
from engrax.errors import UserError
from engrax.evals import scoring
from engrax.tests.experiments import tiny
from engrax.train import experiment as experiments

SEQ = 32
NAMES = "abc"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three folders of different sizes, each of texts of one letter, 200 to 3,000 bytes long."""
    root = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    for name, count in zip(NAMES, (60, 6, 16)):
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i}.txt").write_text(name * (200 + int(rng.integers(2800))) + str(i))
    return root


def mixture(folders, weights=(6, 3, 1), **fields):
    sources = tuple(TextFolder(path=str(folders / name)) for name in NAMES[: len(weights)])
    return Mixture(**{"sources": sources, "weights": weights, "seq_len": SEQ, **fields})


def tokens_of(batch):
    """Tokens of each source in a batch, recognised by the letter of its texts."""
    rows = [row[ids >= 0] for row, ids in zip(batch["tokens"], batch["segment_ids"])]
    kinds = [next(i for i, name in enumerate(NAMES) if ord(name) in row) for row in rows if len(row)]
    return np.bincount(kinds, [len(row) for row in rows if len(row)], minlength=3)


def take(loader, count):
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize(
    "weights, batches",
    [((6, 3, 1), 20), ((0.02, 0.96, 0.02), 10), pytest.param((6, 3, 1), 100, marks=pytest.mark.deep)],
)
def test_the_shares_are_the_weights(folders, weights, batches):
    """When 10,000 rows are read, then every source has its share of the tokens to 1 % of it (to 5 % of 2,000 rows), and
    nearly so in each batch. Sources one after the other are not a mixture (mosaicml/streaming#342)."""
    loader = mixture(folders, weights).loader("train", batch_size=100)
    found = np.array([tokens_of(batch) for batch in take(loader, batches)])
    wanted = np.array(weights) / sum(weights)
    np.testing.assert_allclose(found.sum(axis=0) / found.sum(), wanted, rtol=1 / batches)
    assert np.abs(found / found.sum(axis=1, keepdims=True) - wanted).max() < 0.05


def test_positions_are_exact_over_resuming_and_processes(folders):
    """When a position is saved as JSON, then any number of processes continues from it with the same rows."""
    mixed = mixture(folders)
    loader = mixed.loader("train", batch_size=12, seed=5)
    take(loader, 20)
    position = json.loads(json.dumps(loader.get_state()))
    assert len(json.dumps(position)) < 300
    wanted = take(loader, 8)
    for count in (1, 3):
        same = [
            mixed.loader("train", batch_size=12, seed=5, process_index=i, process_count=count) for i in range(count)
        ]
        for part in same:
            part.set_state(position)
        for batch in wanted:
            parts = [next(part) for part in same]
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    again = take(mixed.loader("train", batch_size=12, seed=5), 3)[-1]
    np.testing.assert_equal(again, take(mixed.loader("train", batch_size=12, seed=5), 3)[-1])
    assert any((next(mixed.loader("train", batch_size=12, seed=s))["tokens"] != again["tokens"]).any() for s in (6, 7))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_one_epoch_has_every_text_once(folders, split):
    """When a source is exhausted, then the others continue and nothing is read twice (huggingface/datasets#8626)."""
    mixed = mixture(folders)
    found = sum(tokens_of(batch) for batch in mixed.loader(split, batch_size=7, epochs=1))
    wanted = [sum(map(len, source.documents(split))) for source in mixed.sources]
    assert found.tolist() == wanted
    first = tokens_of(next(mixed.loader(split, batch_size=4, epochs=1)))
    assert np.count_nonzero(first) >= 2  # the first batches are already mixed


def test_target_bytes_and_alignment(folders):
    loader = mixture(folders).loader("train", batch_size=8, align=8, target_bytes=True)
    for batch in take(loader, 10):
        scored = batch["targets"] >= 0
        np.testing.assert_array_equal(batch["target_bytes"], scored)
        starts = np.flatnonzero(np.diff(batch["segment_ids"][0], prepend=-9) > 0)
        assert all(start % 8 == 0 for start in starts)


def test_it_is_told_and_saved(folders):
    mixed = mixture(folders)
    splits = mixed.splits()
    assert splits.train.documents == sum(len(source.documents("train")) for source in mixed.sources)
    assert splits.validation.bytes == sum(source.splits().validation.bytes for source in mixed.sources)
    assert any("source 1 (text_folder), 30.0% of the tokens: train split" in note for note in splits.notes)
    assert experiments.from_json(experiments.to_json(tiny(data=mixed))).data == mixed
    changed = dataclasses.replace(mixed, sources=mixed.sources[:2] + (StdlibText(max_bytes=20_000),))
    assert changed.digest() != mixed.digest() == mixture(folders, weights=(1, 1, 1)).digest()


def test_baselines_count_the_rows_as_trained(folders):
    """When sources have their own epochs, then repeated rows count again, as the model saw them."""
    experiment = tiny(data=mixture(folders, seq_len=512), batch_size=4)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, vocab_size=256))
    seen, epochs = scoring.seen_rows(experiment, 150)
    assert len(seen) == 600 and np.isnan(epochs)
    assert experiment.data.counts_bytes and scoring.kind_of(experiment) == "text"


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda root: Mixture(), "mixture needs sources"),
        (lambda root: mixture(root, sources=(StdlibText(),)), "1 sources and 3 weights"),
        (lambda root: mixture(root, (1, 0)), "must be positive and finite, not 0"),
        (lambda root: mixture(root, (1, float("nan"))), "must be positive and finite, not nan"),
        (lambda root: mixture(root, (1, float("inf"))), "must be positive and finite, not inf"),
        (lambda root: Mixture(sources=(MQAR(),), weights=(1,)), "mqar is no data set of text"),
        (lambda root: mixture(root).loader("train", batch_size=3, process_count=2), "does not divide by the 2"),
        (
            lambda root: mixture(root).loader("train", batch_size=4).set_state({"document": 1, "row": 0}),
            "of a mixture|to a mixture",
        ),
        (lambda root: mixture(root / "no").digest(), "does not exist"),
    ],
)
def test_mistakes_are_one_sentence(folders, make, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        make(folders)
    assert "\n" not in str(caught.value)


def test_sources_with_different_tokenizers(folders, tmp_path):
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")).save(str(tmp_path / "tokenizer.json"))
    other = TextFolder(path=str(folders / "a"), tokenizer_file=str(tmp_path / "tokenizer.json"))
    mixed = Mixture(sources=(StdlibText(), other), weights=(1, 1))
    with pytest.raises(UserError, match="sources 0 and 1 of the mixture have different tokenizers"):
        mixed.loader("train", batch_size=1)
