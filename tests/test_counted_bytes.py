"""The source bytes of every token, exact for every kind of tokenizer and all cuts."""

import functools

import numpy as np
import pytest

from engrax.data import ByteTokenizer, JsonTokenizer, TextFolder
from engrax.data.config import Share
from engrax.data.encoded import Encoded, bytes_of_spans, readable
from engrax.data.pipeline import PackedText
from engrax.data.stream import StreamedText

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402

SPACE = "\u2581"  # SentencePiece's mark
LETTERS = "abcdefghijklmnopqrstuvwxyz"
FALLBACK = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}

DOCUMENTS = [
    b"the cat sat on the mat",
    b"  leading, trailing \t\n ",
    "na\u00efve caf\u00e9 \u6f22\u5b57 e\u0301\u0323 \ufb01n".encode(),
    "\U0001f642\U0001f468\u200d\U0001f469\u200d\U0001f467".encode(),
    b"lines\r\nof\r\n\r\ntwo systems\n",
    b"a NUL \x00 and \x10 and \x7f",
    b"not UTF-8: \xff\xfe \xe2\x82 \xf0\x9f\x98 \xed\xa0\x80 \xc3",
    "\ufeffa mark, \ufffd, THE END<end>qq  42 x1984".encode(),
    b"",
    b"   \n\t ",
    "\u1f10\u03bd\u03b8\u03ac\u03b4\u1fbd \u1111\u1161\u11ab \u0130\u00df \u2026\u2026".encode(),
]


def bpe(merges=(), vocab=BYTES, **fields):
    vocab = vocab | {a + b: len(vocab) + i for i, (a, b) in enumerate(merges)}
    return Tokenizer(models.BPE(vocab, list(merges), **fields))


def byte_level(*, prefix=False, trim=False):
    made = bpe([("t", "h"), ("th", "e"), ("\u0120", "the"), ("\u00c3", "\u00a9"), ("\u0120", "\u0120")])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim)
    return made


def sentence_piece(*, space: bool):
    letters = LETTERS + SPACE if space else LETTERS
    vocab = FALLBACK | {c: 257 + i for i, c in enumerate(letters)}
    made = bpe([("t", "h"), ("th", "e")], vocab, byte_fallback=True, unk_token="<unk>")
    made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    joined = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*joined, decoders.Replace(SPACE, " "), decoders.Strip(" ", 1, 0)])
    return made


def normalised(normalizer):
    """A model of single characters, with byte fallback for others, after a normalizer."""
    made = bpe((), FALLBACK | {c: 257 + i for i, c in enumerate(LETTERS)}, byte_fallback=True, unk_token="<unk>")
    made.normalizer, made.decoder = normalizer, decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return made


def unigram():
    pieces = [("<unk>", 0.0), (SPACE, -2.0), (SPACE + "the", -3.0), *((c, -4.0) for c in LETTERS)]
    made = Tokenizer(models.Unigram(pieces, unk_id=0))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return made


def word_piece():
    pieces = ["[UNK]", "the", "ca", "##t", "##s", "on", "ma", "a", ".", ",", "sat", "[SEP]"]
    made = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 11)])
    return made


def word_level(*pre):
    pieces = ["?", "the", "cat", "on", "t", "h", "e"]
    made = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Sequence(list(pre))
    return made


def word_ends(unknown: str | None):
    vocab = {"?": 0} | {c: 1 + i for i, c in enumerate(LETTERS)} | {c + "</w>": 27 + i for i, c in enumerate(LETTERS)}
    merges = [("t", "h"), ("th", "e</w>"), ("a", "t</w>")]
    made = bpe(merges, vocab, end_of_word_suffix="</w>", unk_token=unknown)
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return made


def with_added_strings():
    made = byte_level()
    made.add_special_tokens([AddedToken("<end>", special=True)])
    made.add_tokens([AddedToken("qq", lstrip=True, rstrip=True), AddedToken("cat", single_word=True)])
    return made


KINDS = {
    "byte_level": byte_level,
    "byte_level_with_a_prefix_space": lambda: byte_level(prefix=True),
    "byte_level_with_trimmed_offsets": lambda: byte_level(prefix=True, trim=True),
    "sentence_piece": lambda: sentence_piece(space=True),
    "sentence_piece_without_a_space_piece": lambda: sentence_piece(space=False),
    "unigram_with_metaspace": unigram,
    "word_piece": word_piece,
    "word_level": lambda: word_level(pre_tokenizers.Whitespace()),
    "word_ends": lambda: word_ends("?"),
    "word_ends_that_drop_the_unknown": lambda: word_ends(None),
    "nfkc_and_lower_case": lambda: normalised(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")])
    ),
    "nfd_without_accents": lambda: normalised(normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])),
    "nfkd": lambda: normalised(normalizers.NFKD()),
    "strip": lambda: normalised(normalizers.Strip()),
    "longer_and_dropped": lambda: normalised(
        normalizers.Sequence([normalizers.Replace("x", ""), normalizers.Replace(Regex("a+"), "abc")])
    ),
    "added_strings": with_added_strings,
    "characters": lambda: word_level(pre_tokenizers.Split("", "isolated")),
    "digits": lambda: word_level(pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)),
}


@functools.cache
def kind_file(name: str, folder) -> str:
    path = str(folder / f"{name}.json")
    KINDS[name]().save(path)
    return path


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """name -> the path of a tokenizer.json."""
    folder = tmp_path_factory.mktemp("kinds")
    return lambda name: kind_file(name, folder)


def plainly_counted(made: Tokenizer, document: bytes) -> list[int]:
    """The bytes of every token by the rule, one character and one token at a time."""
    sizes = []
    at = 0
    while at < len(document):  # one character, or a run of invalid bytes
        for length in (1, 2, 3, 4):
            try:
                document[at : at + length].decode()
                break
            except UnicodeDecodeError as error:
                length = error.end
                if not error.reason.startswith("unexpected end") or at + length == len(document):
                    break
        sizes.append(length)
        at += length
    found = made.encode(document.decode(errors="replace"), add_special_tokens=False)
    return owned(found.offsets, sizes)


def owned(spans, sizes) -> list[int]:
    """The bytes of every span by the rule: a character's go to the last span with it, or to the neighbour's."""
    held = [[t for t, (start, end) in enumerate(spans) if start <= c < end] for c in range(len(sizes))]
    owner = next((tokens[-1] for tokens in held if tokens), len(spans) - 1)
    counted = [0] * len(spans)
    for tokens, size in zip(held, sizes if counted else ()):
        owner = tokens[-1] if tokens else owner
        counted[owner] += int(size)
    return counted


@pytest.mark.parametrize("name", KINDS)
def test_bytes_of_a_document_sum_to_its_length(name, kinds):
    """When a document has tokens, then their bytes sum to its length, and each token has its plainly counted bytes."""
    tokenizer, made = JsonTokenizer(kinds(name)), Tokenizer.from_file(kinds(name))
    made.post_processor = None  # trims spans
    for document in DOCUMENTS:
        found = tokenizer.encode_with_bytes(document)
        np.testing.assert_array_equal(found.tokens, tokenizer.encode(document))
        assert found.tokens.dtype == np.int32 and found.bytes.dtype == np.uint8
        assert found.bytes.tolist() == plainly_counted(made, document)
        assert found.bytes.sum() == (len(document) if len(found) else 0)


# The bytes that each token of a text should have, written by hand, with the pieces of the text.
BY_HAND = [
    ("byte_level", "the caf\u00e9 ", [3, 1, 1, 1, 1, 2, 1]),
    ("byte_level_with_a_prefix_space", "the the", [3, 4]),  # the space before the first word is not in the text
    ("byte_level_with_trimmed_offsets", "the the", [3, 4]),  # the space is spelled by the second token
    ("byte_level", "i \u2b62 j", [1, 1, 0, 0, 3, 1, 1]),  # huggingface/tokenizers#156
    ("byte_level", "x\U0001f415", [1, 0, 0, 0, 4]),  # karpathy/nanochat#693: each was decoded alone, 3 bytes of U+FFFD
    ("sentence_piece", "the the", [0, 3, 1, 3]),
    ("sentence_piece_without_a_space_piece", "a a", [0, 0, 0, 1, 0, 0, 1, 1]),
    ("unigram_with_metaspace", "the zz\u6f22", [3, 1, 1, 1, 3]),
    ("word_piece", " The  cats. ", [6, 2, 1, 1, 2]),
    ("word_level", " the dog  on ", [5, 5, 3]),  # the unknown word has its 3 bytes and the dropped spaces
    ("word_ends", "the \u00e9 hat", [4, 3, 1, 2]),
    ("nfkc_and_lower_case", "\ufb01N", [0, 3, 1]),
    ("nfkc_and_lower_case", "\u1111\u1161\u11aba", [0, 0, 9, 1]),  # huggingface/tokenizers#1201: one syllable
    ("nfkc_and_lower_case", "a\u2026b", [1, 0, 0, 3, 1]),  # huggingface/tokenizers#663: three dots
    ("nfd_without_accents", "e\u0301\u0323x", [5, 1]),
    ("strip", "  a b \n", [3, 1, 3]),
    ("longer_and_dropped", "xaaxb", [0, 0, 4, 1]),
    ("added_strings", "the<end> qq  x", [3, 5, 5, 1]),
    ("characters", "the\u00e9", [1, 1, 1, 2]),
    ("digits", "on 1984", [3, 1, 1, 1, 1]),
]


@pytest.mark.parametrize("name, text, expected", BY_HAND)
def test_bytes_of_each_token_by_hand(name, text, expected, kinds):
    tokenizer = JsonTokenizer(kinds(name))
    assert tokenizer.encode_with_bytes(text).bytes.tolist() == expected
    assert sum(expected) == len(text.encode())


def test_the_compatibility_space_of_a_letter_is_counted_once(kinds):
    """NFKD turns a Greek koronis into a space and an accent (huggingface/tokenizers#1663): they spell one character."""
    found = JsonTokenizer(kinds("nfkd")).encode_with_bytes("a\u1fbdb")
    assert found.bytes.tolist() == [1, 0, 0, 3, 1]


def test_bytes_that_are_no_text_keep_their_number():
    """When bytes are not UTF-8, then the text is as with errors="replace" and every character has its own bytes."""
    rng = np.random.default_rng(0)
    parts = np.frombuffer(b"A\xe2\x82\xac\xf0\x9f\x98\x80\xff\xc3\xed\xa0\x00\xbd", np.uint8)
    for _ in range(500):
        document = rng.choice(parts, rng.integers(12)).tobytes()
        text, sizes = readable(document)
        assert text == document.decode(errors="replace") and sizes.sum() == len(document)
    text, sizes = readable("A\ufffd\u20ac\U0001f600".encode() + b"\xff")
    assert sizes.tolist() == [1, 3, 3, 4, 1]


def test_spans_of_any_order_and_overlap():
    """When spans are empty, nested, reversed or beyond the text (huggingface/tokenizers#1775), the rule holds."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        spans, sizes = rng.integers(0, 25, (rng.integers(1, 15), 2)), rng.integers(1, 5, rng.integers(1, 25))
        spans = spans if trial % 3 else np.sort(spans, axis=1)
        assert bytes_of_spans(spans, sizes).tolist() == owned(spans, sizes)
    assert bytes_of_spans(np.zeros((0, 2), int), np.ones(3, int)).tolist() == []


def documents_with_bytes(count=60, seed=0):
    """Documents of 0 to 90 tokens; every token occurs once, so its bytes can be looked up: (documents, bytes)."""
    rng = np.random.default_rng(seed)
    lengths = np.r_[0, 1, 31, 32, 33, 96, rng.integers(0, 90, count)]
    sizes = rng.integers(0, 300, lengths.sum())
    ends = np.cumsum(lengths)
    return [Encoded(np.arange(e - n, e), sizes[e - n : e]) for e, n in zip(ends, lengths)], sizes


@pytest.mark.parametrize("align", [1, 8])
def test_cuts_of_a_document_sum_to_its_length(align):
    """When documents are cut into rows, then every target has its bytes; with the first token's, all are there."""
    documents, sizes = documents_with_bytes()
    fields = dict(seq_len=32, seed=0, epochs=1, align=align, buffer_tokens=500, target_bytes=True)
    batches = list(PackedText(documents, lambda d: d, share=Share.of(4, 0, 1), **fields))
    found = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    scored = found["targets"] >= 0
    assert found["target_bytes"].dtype == np.int32 and not found["target_bytes"][~scored].any()
    np.testing.assert_array_equal(found["target_bytes"][scored], sizes[found["targets"][scored]])
    first = sum(int(d.bytes[0]) for d in documents if len(d))
    assert found["target_bytes"].sum() + first == sum(int(d.bytes.sum()) for d in documents)
    halves = [list(PackedText(documents, lambda d: d, share=Share.of(4, i, 2), **fields)) for i in (0, 1)]
    joined = [np.concatenate([a["target_bytes"], b["target_bytes"]]) for a, b in zip(*halves)]
    np.testing.assert_array_equal(np.concatenate(joined), found["target_bytes"])


@pytest.mark.parametrize("align", [1, 8])
def test_pieces_of_a_stream_sum_to_the_documents(align):
    """When rows are streams, then a document's targets have their bytes in any batch."""
    documents, sizes = documents_with_bytes()
    fields = dict(seq_len=32, seed=0, align=align, share=Share.of(3, 0, 1))
    loader = StreamedText(documents, lambda d: d, target_bytes=True, **fields)
    plain = StreamedText(documents, lambda d: d, **fields)
    for _ in range(80):
        batch, without = next(loader), next(plain)
        scored = batch["targets"] >= 0
        np.testing.assert_array_equal(batch["target_bytes"][scored], sizes[batch["targets"][scored]])
        assert not batch.pop("target_bytes")[~scored].any()
        np.testing.assert_equal(batch, without)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with documents of every kind of text, some longer than a row."""
    folder = tmp_path_factory.mktemp("corpus")
    kinds = [text for text in DOCUMENTS if b"\0" not in text and text.decode(errors="ignore").encode() == text]
    for i in range(24):
        text = b" ".join(kinds[j % len(kinds)] for j in range(i, i + 1 + i % 5))
        (folder / f"{i:02}.txt").write_bytes(b"the %d " % i + text)
    return str(folder)


@pytest.mark.parametrize("name", [None, *KINDS])
def test_bits_per_byte_divide_by_the_texts_own_bytes(name, kinds, corpus):
    """When a corpus is read at any batch size or as streams, then its targets have the bytes of a plain count."""
    path = None if name is None else kinds(name)
    data = TextFolder(path=corpus, seq_len=16, validation_fraction=0.4, tokenizer_file=path)
    documents = list(data.token_documents("validation"))
    texts = data.documents("validation")
    assert [d.bytes.sum() for d in documents] == [len(text) for text in texts] and len(texts) > 3
    wanted = sum(map(len, texts)) - sum(int(d.bytes[0]) for d in documents)
    for rows in (1, 7):
        loader = data.loader("validation", batch_size=rows, epochs=1, target_bytes=True)
        batches = list(loader)
        assert sum(int(batch["target_bytes"].sum()) for batch in batches) == wanted
        assert sum(int((batch["targets"] >= 0).sum()) for batch in batches) == sum(len(d) - 1 for d in documents)


def test_training_reads_no_bytes(corpus):
    """When no bytes are requested, as in training, then a loader's batches do not have them."""
    data = TextFolder(path=corpus, seq_len=16)
    plain, counted = (data.loader("train", batch_size=2, target_bytes=asked) for asked in (False, True))
    for _ in range(5):
        batch, more = next(plain), next(counted)
        assert set(more) - set(batch) == {"target_bytes"} and plain.get_state() == counted.get_state()
        np.testing.assert_equal(batch, {name: more[name] for name in batch})


def test_kept_bytes_are_small(kinds):
    """When tokens are kept in memory, then their byte counts take one byte each, or none with the byte tokenizer."""
    assert JsonTokenizer(kinds("byte_level")).encode_with_bytes("the cat").bytes.dtype == np.uint8
    assert JsonTokenizer(kinds("strip")).encode_with_bytes("a" + " " * 300).bytes.tolist() == [301]
    assert ByteTokenizer().encode_with_bytes(b"a" * 1000).bytes.strides == (0,)


# A tokenizer that does not reproduce its text.


GIVES_BACK = {"byte_level", "sentence_piece", "sentence_piece_without_a_space_piece"}


@pytest.mark.parametrize("name", KINDS)
def test_a_tokenizer_that_changes_its_text_is_named(name, kinds, corpus):
    """When decoded documents differ from the text, then one sentence names the tokenizer's file; else none does."""
    told = TextFolder(path=corpus, tokenizer_file=kinds(name)).warnings()
    assert len(told) == (name not in GIVES_BACK)
    assert all(sentence.startswith(f"tokenizer {kinds(name)} does not give back its text: ") for sentence in told)


def test_the_warning_shows_the_first_change(kinds, tmp_path):
    """When only a later document changes, then it is found; reproduced data has no warning."""
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text(f"the cat on {'on ' * i}the cat")
    data = TextFolder(path=str(tmp_path), tokenizer_file=kinds("word_level"))
    assert data.warnings() == []  # the same tokenizer as above reproduces this text
    (tmp_path / "9.txt").write_text("the cat on the on the  Cat on the on")
    assert "' the on the  Cat on the ' comes back as ' the on the ? on the on'" in data.warnings()[0]
    assert TextFolder(path=str(tmp_path)).warnings() == []
    (tmp_path / "9.txt").write_text("THE cat")  # decodes to the same length
    data = TextFolder(path=str(tmp_path / "9.txt"), tokenizer_file=kinds("nfkc_and_lower_case"))
    assert len(data.warnings()) == 1


def test_a_run_divides_by_the_bytes_and_names_the_tokenizer(kinds, corpus, tmp_path, capsys):
    """When a run is trained, validated, evaluated and described, then all divide by the source bytes and warn."""
    from engrax import cli
    from engrax.evals import evaluate, scoring, streaming
    from engrax.layers import AttentionConfig
    from engrax.models import LanguageModelConfig
    from engrax.train import EvalConfig, Experiment, LogConfig, metrics
    from engrax.train.loop import train

    data = TextFolder(path=corpus, seq_len=32, validation_fraction=0.4, tokenizer_file=kinds("nfkc_and_lower_case"))
    mixer = AttentionConfig(heads=1, head_dim=4, window=8)
    model = LanguageModelConfig(vocab_size=data.vocab_size, dim=8, mixers=(mixer,), repeat=1, mlp_hidden=8)
    short = {"steps": 1, "batch_size": 2, "eval": EvalConfig(every=1, batches=100), "log": LogConfig(every=1)}
    train(Experiment(model=model, data=data, compute_dtype="float32", **short), tmp_path / "run", progress=False)
    told = data.warnings()[0]
    assert capsys.readouterr().err.count(f"warning: {told}") == 1

    results = evaluate(tmp_path / "run", only=["validation", "baselines"], progress=False)
    assert results.data["warnings"] == [told] and told in capsys.readouterr().err
    found = results.evaluations["validation"]
    kept = {split: list(data.token_documents(split)) for split in ("train", "validation")}
    size = {split: sum(map(len, data.documents(split))) - sum(int(d.bytes[0]) for d in kept[split]) for split in kept}
    assert found["complete"] and found["bytes"] == size["validation"]
    bits = found["loss_nats_per_token"] * found["tokens"] / np.log(2)
    assert results.bits_per_byte == pytest.approx(bits / size["validation"], rel=1e-6)
    validated = metrics.read(tmp_path / "run")[-1]["validation_bits_per_byte"]
    assert validated == pytest.approx(results.bits_per_byte, rel=1e-5)

    seen, _ = scoring.seen_rows(Experiment(model=model, data=data, **short | {"steps": 100}), 100)
    assert seen.complete and seen.target_bytes.sum() == size["train"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "LENGTH_UNIT", 32)
        read = streaming.long_documents(Experiment(model=model, data=data), 64)
    for tokens, counted in zip(read.tokens, read.bytes, strict=True):
        whole = next(d for d in kept["validation"] if np.array_equal(d.tokens[:65], tokens))
        np.testing.assert_array_equal(counted, whole.bytes[:65])

    assert cli.main(["describe", str(tmp_path / "run")]) == 0
    assert f"warning: {told}" in capsys.readouterr().err
    assert cli.main(["describe", str(tmp_path / "run"), "--data.path", str(tmp_path / "none")]) == 0
    assert "was not tried on the data" in capsys.readouterr().err
