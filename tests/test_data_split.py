"""The split into train and validation: a fair sample of every size, stable when files are added, and reported."""

import dataclasses
import hashlib

import numpy as np
import pytest

from engrax import cli
from engrax.data import StdlibText, TextFolder
from engrax.data import split as rule
from engrax.data.corpus import Corpus
from engrax.errors import UserError
from engrax.tests.experiments import tiny
from engrax.train.loop import train

FRACTION = 0.05


def letters(seed, length):
    return np.random.default_rng(seed).integers(97, 123, length).astype(np.uint8).tobytes()


def corpus(sizes, first=0):
    return Corpus([(str(i), letters(first + i, size)) for i, size in enumerate(sizes)])


def kinds(documents, bound=10_000):
    return sum(len(d) >= bound for d in documents), sum(len(d) < bound for d in documents)


@pytest.mark.parametrize(
    "sizes",
    [
        [40_000] * 10 + [200] * 500,  # books and notes
        [40_000] * 500 + [200] * 10,
        [100_000] * 2 + [30] * 2,
        [20_000, 30_000] + [5_000] * 300,
    ],
)
def test_every_kind_of_document_is_in_both_splits(sizes):
    """A split by an order of the corpus (length, language) is not a sample of it: marin-community/marin#708."""
    splits = corpus(sizes).split(FRACTION)
    assert min(kinds(splits["train"])) > 0 and min(kinds(splits["validation"])) > 0


def test_a_large_class_gives_its_fraction():
    splits = corpus([300] * 4000).split(FRACTION)
    assert len(splits["validation"]) == pytest.approx(200, abs=42)  # three standard deviations


def test_the_rule_of_one_class():
    """Validation has the documents with a hash below the fraction, else the one with the smallest hash."""
    texts = [letters(i, 100) for i in range(12)]
    places = [int(hashlib.sha256(text).hexdigest()[:12], 16) / 2**48 for text in texts]
    for fraction in (0.001, 0.2, 0.5):
        wanted = {t for t, p in zip(texts, places) if p < fraction} or {texts[int(np.argmin(places))]}
        found = Corpus([(str(i), text) for i, text in enumerate(texts)]).split(fraction)
        assert set(found["validation"]) == wanted and set(found["train"]) == set(texts) - wanted


def test_classes_are_powers_of_four():
    places = np.array([0.9, 0.5, 0.8, 0.7, 0.6, 0.4])
    chosen = rule.choose(places, np.array([4**5 - 1, 4**5 - 2, 4**5, 4**6 - 1, 4**6, 4**6 + 1]), FRACTION)
    assert chosen.tolist() == [False, True, False, True, False, True]


@pytest.mark.parametrize("added", [90, 250, 300, 3_000, 50_000])
def test_an_added_file_moves_at_most_one_document_of_a_class(added):
    """Otherwise a run that continues with more text validates on its training text: marin-community/marin#2700."""
    sizes = [90] * 3 + [250] * 30 + [3_000] * 2 + [50_000]
    before = corpus(sizes).split(FRACTION)
    for seed in range(20):
        files = [(str(i), letters(i, size)) for i, size in enumerate(sizes)] + [("new", letters(1000 + seed, added))]
        after = Corpus(files).split(FRACTION)
        moved = [text for name in before for text in set(before[name]) - set(after[name])]
        assert len(moved) <= 1 and all((len(t).bit_length() - 1) // 2 == (added.bit_length() - 1) // 2 for t in moved)


@pytest.mark.parametrize("sizes", [[2], [2, 2], [1, 1000], [1000, 1000], [5, 5, 5], [1] * 30, [10, 100, 1000, 10_000]])
@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_both_splits_have_text_however_small_the_corpus(sizes, fraction):
    files = {letters(i, size) for i, size in enumerate(sizes)}
    splits = Corpus([(str(i), text) for i, text in enumerate(files)]).split(fraction)
    assert all(splits["train"]) and all(splits["validation"]) and splits["train"] and splits["validation"]
    assert sum(map(len, splits["train"] + splits["validation"])) == sum(map(len, files))


@pytest.mark.parametrize("size", [2 * rule.SECTION, 10 * rule.SECTION - 1, 40 * rule.SECTION + 17])
@pytest.mark.parametrize("character", ["a", "line of text\n", "\U0001f642"])
def test_one_document_is_cut_into_sections(size, character):
    text = "".join(f"{i} {character}" for i in range(size // 5)).encode()[:size].decode(errors="ignore").encode()
    parts = list(rule.sections(text[i : i + 1000] for i in range(0, len(text), 1000)))
    assert b"".join(parts) == text and parts == list(rule.sections([text]))
    assert all(part.decode() for part in parts)  # no character is cut
    assert all(rule.SECTION <= len(part) + 3 < 2 * rule.SECTION + 4 for part in parts)
    if character.endswith("\n"):
        assert all(part.endswith(b"\n") for part in parts[:-2])  # the last cut may have no room for it
    splits = Corpus([("book", text)]).split(FRACTION)
    assert sorted(splits["train"] + splits["validation"]) == sorted(parts)
    assert splits["validation"] and splits["train"]


def test_copies_count_once_and_one_text_in_many_files_is_one_document():
    text = letters(0, 5 * rule.SECTION)
    one, many = Corpus([("a", text)]), Corpus([(str(i), text) for i in range(7)])
    assert one.split(FRACTION) == many.split(FRACTION)
    assert "6 exact copies" in " ".join(many.splits(FRACTION).notes)
    assert "5 sections of 64 KiB" in " ".join(one.splits(FRACTION).notes)


@pytest.fixture
def two(tmp_path):
    """Two folders: one of 30 documents, and one of 5 others with 2 of the 30 and a copy."""
    for name in ("texts", "mine"):
        (tmp_path / name).mkdir()
    for i in range(30):
        (tmp_path / "texts" / f"{i}.txt").write_bytes(letters(i, 100 + i))
    for i in (3, 4, 100, 101, 102, 103, 104):
        (tmp_path / "mine" / f"{i}.txt").write_bytes(letters(i, 100 + i))
    (tmp_path / "mine" / "copy.txt").write_bytes(letters(104, 204))
    return tmp_path


def test_a_validation_split_of_ones_own(two):
    """Documents in both are left out of train; published splits do share documents: huggingface/datasets#4261."""
    config = TextFolder(path=str(two / "texts"), validation_path=str(two / "mine"))
    train, validation = config.documents("train"), config.documents("validation")
    assert sorted(validation) == sorted(letters(i, 100 + i) for i in (3, 4, 100, 101, 102, 103, 104))
    assert sorted(train) == sorted(letters(i, 100 + i) for i in range(30) if i not in (3, 4))
    told = " ".join(config.splits().notes)
    assert "2 document(s) of the validation files were left out of train" in told and "1 exact copy" in told
    digests = {config.digest(), TextFolder(path=str(two / "texts")).digest()}
    (two / "mine" / "100.txt").write_bytes(b"changed")
    assert len(digests | {config.digest()}) == 3


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(validation_path="nowhere"), "nowhere does not exist"),
        (dict(validation_path="texts"), "hold every document"),
        (dict(validation_path="empty"), "holds no text"),
    ],
)
def test_a_validation_path_that_cannot_serve(two, monkeypatch, fields, sentence):
    monkeypatch.chdir(two)
    (two / "empty").mkdir()
    with pytest.raises(UserError, match=sentence):
        TextFolder(path="texts", **fields).loader("train", batch_size=1)


def test_sizes_are_told(two, capsys):
    splits = TextFolder(path=str(two / "texts")).splits()
    sizes = [[len(d) for d in TextFolder(path=str(two / "texts")).documents(s)] for s in ("train", "validation")]
    for told, found in zip((splits.train, splits.validation), sizes):
        assert (told.documents, told.bytes) == (len(found), sum(found))
        assert told.lengths == (min(found), int(np.median(found)), max(found))
    assert cli.main(["describe", "quickstart", "--data.max-bytes", "50000"]) == 0
    size = StdlibText(max_bytes=50_000).splits().validation
    assert f"validation split  {size}" in capsys.readouterr().out.replace("  " * 9, "")


def test_describe_needs_no_text(capsys):
    assert cli.main(["describe", "mom_340m", "--model.repeat", "1"]) == 0
    assert "text folder corpus does not exist" in capsys.readouterr().out


def test_a_validation_without_a_labelled_token_is_refused_before_the_first_step(tmp_path):
    """A split with nothing to predict would fail hours later, at the first validation (ai-forever/ru-gpts#15 met one as
    an empty sampler)."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "mine").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_bytes(letters(i, 200))
        (tmp_path / "mine" / f"{i}.txt").write_bytes(bytes([65 + i]))
    data = TextFolder(path=str(tmp_path / "texts"), validation_path=str(tmp_path / "mine"), seq_len=16)
    with pytest.raises(UserError, match="no labelled token"):
        model = dataclasses.replace(tiny().model, vocab_size=256)
        train(tiny(data=data, model=model), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
