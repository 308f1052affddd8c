"""Text data sets held in memory, and tokenizers: splits, digests, quick start, and what a user can do wrong."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from engrax.data import DATASETS, ByteTokenizer, JsonTokenizer, Loader, StdlibText, TextFolder
from engrax.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder of 40 distinct text files in two levels, with copies, and files that are not text or empty."""
    root = tmp_path / "texts"
    (root / "deep" / "er").mkdir(parents=True)
    for i in range(40):
        place = (root, root / "deep", root / "deep" / "er")[i % 3]
        (place / f"{i:02}.txt").write_bytes(f"text {i} ".encode() * (5 + 3 * i))
    for i in range(10):
        (root / f"copy{i}.md").write_bytes(f"text {i} ".encode() * (5 + 3 * i))
    (root / "binary.bin").write_bytes(bytes(range(256)))
    (root / ".hidden.txt").write_text("hidden")
    (root / "empty.txt").write_text("")
    return root


@pytest.fixture
def tokenizer_file(tmp_path):
    """A byte-level BPE tokenizer of 300 tokens with one special token."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = ["".join(letters) for letters in itertools.product("thes", repeat=3)]
    tokenizer.train_from_iterator([" ".join(["the text of the test", *words])] * 5, trainer)
    tokenizer.enable_truncation(8)  # must not apply before packing
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def epoch_text(config, split):
    """Returns the decoded segments of one pass over a split."""
    decoded = []
    for batch in config.loader(split, batch_size=4, epochs=1):
        for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
            decoded += [config.tokenizer.decode(tokens[ids == segment]) for segment in range(ids.max() + 1)]
    return decoded


def assert_disjoint(config):
    train, validation = config.documents("train"), config.documents("validation")
    assert train and validation and all(train) and all(validation)
    assert len(set(train) | set(validation)) == len(train) + len(validation)
    return train, validation


def test_stdlib_splits_share_no_document():
    config = StdlibText()
    train, validation = assert_disjoint(config)
    assert sum(map(len, train + validation)) <= config.max_bytes
    assert len(validation) > 5  # a sample, not one file
    assert any(b"\ndef " in document for document in train)


def test_stdlib_sample_is_bounded_and_seeded():
    small = StdlibText(max_bytes=300_000)
    documents = small.documents("train") + small.documents("validation")
    assert 200_000 < sum(map(len, documents)) <= 300_000
    assert small.digest() == StdlibText(max_bytes=300_000).digest()
    assert len({small.digest(), StdlibText().digest(), StdlibText(max_bytes=300_000, sample_seed=1).digest()}) == 3


def test_stdlib_starts_quickly_and_importing_data_is_light():
    code = """
import sys, time
import engrax
before = set(sys.modules)
start = time.process_time()
import engrax.data
imported = time.process_time() - start
heavy = [name for name in ("grain", "tensorflow_datasets", "tokenizers", "jax") if name in set(sys.modules) - before]
next(engrax.data.StdlibText().loader("train", batch_size=16))
print(imported, time.process_time() - start, *heavy)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported, started, *heavy = run.stdout.split()
    assert not heavy, f"importing engrax.data imported {heavy}"
    # Seconds of this process's own work, so that a busy machine does not fail the test.
    assert float(imported) < 0.5 and float(started) < 2.0


def test_stdlib_batches_decode_to_its_documents():
    config = StdlibText(max_bytes=100_000, seq_len=128)
    assert isinstance(config.loader("train", batch_size=2), Loader)
    documents = b"\0".join(config.documents("validation"))
    for text in epoch_text(config, "validation"):
        assert "\ufffd" in text or text.encode() in documents
    for batch in itertools.islice(config.loader("train", batch_size=4, align=32), 5):
        assert set(batch) == {"tokens", "targets", "segment_ids"}
        assert all(array.shape == (4, 128) and array.dtype == np.int32 for array in batch.values())
        assert batch["tokens"].max() < config.vocab_size == 256


def test_folder_splits_share_no_content(folder):
    train, validation = assert_disjoint(TextFolder(path=str(folder), validation_fraction=0.2))
    assert sorted(train + validation) == sorted(f"text {i} ".encode() * (5 + 3 * i) for i in range(40))
    assert len(validation) >= 3


def test_every_text_of_a_folder_is_seen_once(folder):
    config = TextFolder(path=str(folder), seq_len=16, validation_fraction=0.2)
    for split in ("train", "validation"):
        assert sum(map(len, epoch_text(config, split))) == sum(map(len, config.documents(split)))


def test_names_and_places_of_files_do_not_move_a_text_to_the_other_split(folder, tmp_path):
    config = TextFolder(path=str(folder), validation_fraction=0.2)
    want, digest = config.documents("validation"), config.digest()
    (folder / "00.txt").rename(folder / "deep" / "zz.txt")
    assert config.documents("validation") == want
    assert config.digest() != digest  # the manifest names the files


def test_digest_follows_the_content_and_the_tokenizer(folder, tokenizer_file):
    config = TextFolder(path=str(folder))
    digest = config.digest()
    assert TextFolder(path=str(folder), seq_len=64).digest() == digest
    assert TextFolder(path=str(folder), tokenizer_file=tokenizer_file).digest() != digest
    content = (folder / "00.txt").read_bytes()
    (folder / "00.txt").write_bytes(content[:-1] + b"!")  # the same size
    assert config.digest() != digest
    (folder / "00.txt").write_bytes(content)
    assert config.digest() == digest


@pytest.mark.parametrize("lines", [True, False])
def test_a_short_single_file_is_split_at_one_place(tmp_path, lines):
    path = tmp_path / "book.text"  # a file given by name may end in anything
    content = "".join(f"line {i}\n" for i in range(1000))
    content = (content if lines else content.replace("\n", "\u00df\U0001f642")).encode()
    path.write_bytes(content)
    config = TextFolder(path=str(path), validation_fraction=0.1)
    (head,), (tail,) = config.documents("train"), config.documents("validation")
    assert head + tail == content and head.decode() and tail.decode()
    assert 0.05 * len(content) <= len(tail) <= 0.1 * len(content)
    assert head.endswith(b"\n") == lines
    batch = next(config.loader("train", batch_size=100, epochs=1))
    assert sorted(batch["tokens"][batch["segment_ids"] >= 0]) == sorted(head)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda root: TextFolder(), "needs a path"),
        (lambda root: TextFolder(path=str(root / "missing")).digest(), "missing does not exist"),
        (lambda root: TextFolder(path=str(root)).digest(), "holds no text"),
        (lambda root: TextFolder(path=str(root)).loader("train", batch_size=1), "holds no text"),
        (lambda root: TextFolder(path=str(root), validation_fraction=1.0), "validation_fraction"),
        (lambda root: TextFolder(path=str(root), seq_len=1), "seq_len"),
        (lambda root: StdlibText(max_bytes=1), "max_bytes"),
        (lambda root: StdlibText().loader("test", batch_size=1), "unknown split 'test'"),
        (lambda root: StdlibText().documents("test"), "unknown split 'test'"),
        (lambda root: StdlibText().loader("train", batch_size=3, process_count=2), "does not divide by the 2"),
        (lambda root: StdlibText(seq_len=100).loader("train", batch_size=2, align=64), "not a multiple of align 64"),
        (lambda root: StdlibText(tokenizer_file=str(root / "none.json")).vocab_size, "none.json does not exist"),
        (lambda root: StdlibText(tokenizer_file=str(root / "bad.json")).vocab_size, "not a readable tokenizer.json"),
        (lambda root: StdlibText(tokenizer_file=str(root / "odd.json")).vocab_size, "not a readable tokenizer.json"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, make, sentence):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bad.json").write_text('{"version": "1.0", "model"')
    (tmp_path / "odd.json").write_text("[1, 2]")
    with pytest.raises(UserError, match=sentence) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_python_without_its_sources_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match="keeps no source text"):
        StdlibText().digest()


def test_bytes_round_trip():
    tokenizer = ByteTokenizer()
    for text in ("", "plain", "naïve 漢字 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    raw = bytes(range(256))
    assert tokenizer.encode(raw).tolist() == list(raw) and tokenizer.encode(raw).dtype == np.int32
    assert "\ufffd" in tokenizer.decode([0xFF])
    assert tokenizer.encode_with_bytes(raw).bytes.sum() == tokenizer.vocab_size == 256


def test_json_tokenizer_round_trip(tokenizer_file):
    tokenizer = JsonTokenizer(tokenizer_file)
    for text in ("", "the text of the test", "naïve 漢字 <end>"):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and tokenizer.decode(ids) == text
        np.testing.assert_array_equal(tokenizer.encode(text.encode()), ids)
    assert len(tokenizer.encode("the text of the test " * 10)) > 8  # truncation is off
    assert len(tokenizer.encode("the text")) < len("the text")  # merges apply
    assert tokenizer.vocab_size == 300


def test_folder_with_a_json_tokenizer(folder, tokenizer_file):
    config = TextFolder(path=str(folder), tokenizer_file=tokenizer_file, seq_len=64, validation_fraction=0.2)
    assert config.vocab_size == 300
    words = "".join(epoch_text(config, "validation"))
    assert len(words) == sum(map(len, config.documents("validation")))


def test_a_corpus_is_read_and_encoded_once(folder, tokenizer_file):
    for fields in (dict(), dict(tokenizer_file=tokenizer_file)):
        first, _, _ = TextFolder(path=str(folder), **fields)._source("train")
        again, _, _ = TextFolder(path=str(folder), seq_len=64, **fields)._source("train")
        assert again is first
        assert first[0].tokens.dtype == (np.uint8 if not fields else np.uint16) and first[0].bytes.dtype == np.uint8


def test_registered_names():
    assert {"stdlib_text", "text_folder", "tfds_text", "mqar"} <= set(DATASETS)
    assert DATASETS["stdlib_text"] is StdlibText and StdlibText.registered_name == "stdlib_text"
