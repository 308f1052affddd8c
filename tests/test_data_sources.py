"""Corpora of real users: formats by content, encodings, damaged files, odd folders."""

import bz2
import codecs
import gzip
import json
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from engrax.data import TextFolder
from engrax.errors import UserError

TEXTS = [f"text {i} \u00e9\u4e2d \U0001f642" for i in range(6)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".zst": lambda b: pa.compress(b, "zstd", asbytes=True)}


def read(path, **fields):
    """All documents of a folder or file."""
    config = TextFolder(path=str(path), **fields)
    return sorted(config.documents("train") + config.documents("validation"))


def complaint(path, **fields):
    with pytest.raises(UserError) as caught:
        read(path, **fields)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def write_parquet(path, texts=TEXTS, column="text", **options):
    parquet.write_table(pa.table({"id": range(len(texts)), column: texts}), path, **options)


WANTED = sorted(text.encode() for text in TEXTS)


@pytest.mark.parametrize("ending", PACK)
def test_text_and_json_lines_plain_or_compressed(tmp_path, ending):
    for i, text in enumerate(TEXTS[:3]):
        (tmp_path / f"{i}.txt{ending}").write_bytes(PACK[ending](text.encode()))
    (tmp_path / f"rest.jsonl{ending}").write_bytes(PACK[ending](LINES.split(b"\n", 3)[3]))
    assert read(tmp_path) == WANTED


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_parquet_by_its_own_codecs(tmp_path, codec):
    write_parquet(tmp_path / "part-0.parquet", compression=codec, row_group_size=2)
    assert read(tmp_path) == WANTED


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string()), pa.binary()])
def test_parquet_columns_that_hold_text(tmp_path, kind):
    values = [text.encode() for text in TEXTS] if kind == pa.binary() else TEXTS
    parquet.write_table(pa.table({"body": pa.array(values).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path, field="body") == WANTED


@pytest.mark.parametrize("ending", PACK)
def test_the_content_says_what_a_file_is(tmp_path, ending):
    """A compressed file may lack the ending, and a file with the ending may not be compressed, because downloads and
    mirrors rename files (huggingface/datasets#6908 has a reader that took gzip for UTF-8)."""
    (tmp_path / "lines.txt").write_bytes(PACK[ending](LINES))
    write_parquet(tmp_path / "table.txt", ["a table's text"])
    (tmp_path / "plain.txt.gz").write_bytes(b"plain text")
    assert read(tmp_path) == sorted([*WANTED, b"a table's text", b"plain text"])


def test_several_gzip_members_are_one_file(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES[:100]) + gzip.compress(LINES[100:]))
    assert read(tmp_path) == WANTED


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Unicode has other line ends, which JSON strings may contain: datalad/datalad#3523, wbolster/jsonlines#53."""
    texts = [f"a{end}b" for end in "\u2028\u2029\x85\x0b\x0c\x1c"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "a.jsonl").write_text("\r\n\r\n".join(lines), newline="")
    assert read(tmp_path) == sorted(text.encode() for text in texts)


def test_braces_do_not_make_json_lines(tmp_path):
    texts = ['{\n "text": "pretty"\n}', "{% block %}\n{% endblock %}", '{"a": 1}', "{}\n{ x"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.md").write_text(text)
    assert read(tmp_path) == sorted(text.encode() for text in texts)
    (tmp_path / "lines.jsonl").write_bytes(LINES)
    assert LINES in read(tmp_path, field=None)  # these are text if the user says so


def test_byte_order_marks_and_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\rthree\n\r\n")
    (tmp_path / "b.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "x\\r\\ny"}\r\n')
    assert read(tmp_path) == [b"one\ntwo\rthree\n\n", b"x\r\ny"]


@pytest.mark.parametrize("name", ["utf-16", "utf-16-le", "utf-32", "cp1252", "shift_jis", "gb18030", "koi8_r"])
def test_another_encoding_is_named_and_can_be_given(tmp_path, name):
    """One sentence instead of "'utf-8' codec can't decode byte": huggingface/datasets#6641."""
    words = {"shift_jis": "\u3053\u308c\u306f\u6587", "gb18030": "\u8fd9\u662f\u6587\u5b57"}
    words |= {"koi8_r": "\u044d\u0442\u043e"}
    text = " ".join([words.get(name, "na\u00efve r\u00e9sum\u00e9")] * 300)
    for i in range(2):
        (tmp_path / f"{i}.txt").write_bytes(f"{i} {text}".encode(name))
    told = complaint(tmp_path)
    assert "not UTF-8" in told and f"set encoding to {name}" in told and ".txt" in told
    assert read(tmp_path, encoding=name) == [f"{i} {text}".encode() for i in range(2)]


def test_a_wrong_encoding_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("\u00e9t\u00e9".encode())
    assert "a.txt is not ascii" in complaint(tmp_path, encoding="ascii")
    for name in ("nonsense", "hex", "rot13"):
        with pytest.raises(UserError, match=f"encoding '{name}' is unknown"):
            TextFolder(path=str(tmp_path), encoding=name)


def test_a_character_on_the_edge_of_a_block_is_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("engrax.data.sources._BLOCK", 5)
    text = "\u4e2d\U0001f642\u00e9\r\n" * 9
    for name in ("utf-8", "utf-16"):
        (tmp_path / "a.txt").write_bytes(text.encode(name))
        found = b"".join(sorted(read(tmp_path, encoding=name, validation_fraction=0.5)))
        assert sorted(found) == sorted(text.replace("\r\n", "\n").encode())
    (tmp_path / "a.txt").write_bytes(text.encode()[:-3])
    assert "not UTF-8" in complaint(tmp_path)


BROKEN = {
    "cut.txt.gz": (gzip.compress(b"abc" * 1000)[:-9], "cut.txt.gz is damaged or cut off"),
    "cut.txt.bz2": (bz2.compress(b"abc" * 1000)[:-9], "cut.txt.bz2 is damaged or cut off"),
    "cut.txt.zst": (pa.compress(os.urandom(999), "zstd", asbytes=True)[:-9], "cut.txt.zst is damaged or cut off"),
    "crc.txt.gz": (gzip.compress(b"abc" * 1000)[:-8] + b"\0" * 8, "crc.txt.gz is damaged"),
    "middle.txt.gz": (gzip.compress(os.urandom(999).hex().encode())[:300] + b"\xff" * 300, "middle.txt.gz is damaged"),
    "broken.jsonl": (LINES + b'{"text": "cut', "line 7 of .*broken.jsonl is not JSON"),
    "pretty.jsonl": (b'{\n"text": 1\n}\n', "line 1 of .*pretty.jsonl is not JSON"),
    "other.jsonl": (b'{"id": 1, "content": "x"}', "no field 'text' .it has: id, content"),
    "typed.jsonl": (LINES + b'\n{"text": 5}', "'text' in line 8 of .*typed.jsonl is number, not text"),
    "null.jsonl": (b'{"text": null}', "'text' in line 1 of .* is null"),
    "array.jsonl": (b'[{"text": "a"}]', "line 1 of .*array.jsonl is a JSON list, not an object"),
    "half.jsonl": (b'{"text": "\\ud83d"}', "half a character"),
    "deep.jsonl": (b'{"text": ' + b"[" * 100_000, "line 1 of .*deep.jsonl is not JSON"),
    "bytes.jsonl": (b'{"text": "\xe9"}', "bytes.jsonl is not UTF-8"),
    "nul.txt": (b"a text\0 with NUL", "nul.txt is no text"),
    "image.md": (b"\x89PNG\r\n\x1a\n", "image.md is no text: it is an image"),
    "paper.txt": (b"%PDF-1.7\n", "paper.txt is no text: it is a PDF"),
    "pack.txt.gz": (gzip.compress(gzip.compress(b"a")), "compressed twice"),
    "tar.txt.gz": (gzip.compress(b"name\0\0\0\0ustar"), "tar.txt.gz is no text"),
    "strong.txt": (b"\xfd7zXZ\x00\x00", "compressed with xz"),
    "a.parquet": (b"PAR1" + b"x" * 50, "a.parquet is not readable Parquet"),
    "b.parquet": (b"no table", "b.parquet is no Parquet file"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\noid sha256:6f\nsize 9\n", "a pointer of Git LFS"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_file_is_one_sentence(tmp_path, name):
    """Each error names the file, and the line if there are lines (pointers of Git LFS: git-lfs/git-lfs#4240)."""
    content, wanted = BROKEN[name]
    (tmp_path / "good.txt").write_text("good text")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=wanted) as caught:
        read(tmp_path)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table, wanted",
    [
        (pa.table({"id": [1], "body": ["a"]}), "no column 'text' .it has: id, body"),
        (pa.table({"text": [1, 2]}), "column 'text' .* holds int64, not text"),
        (pa.table({"text": [["a"], ["b"]]}), "not text"),
        (pa.table({"text": ["a", None]}), "'text' in row 2 of .* is null"),
        (pa.table({"text": pa.array([b"\xff"], pa.binary())}), "row 1 of .* is not UTF-8"),
    ],
)
def test_a_table_that_does_not_fit(tmp_path, table, wanted):
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=wanted):
        read(tmp_path)


def test_a_loop_of_links_ends_and_a_folder_counts_once(tmp_path):
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a.txt").write_text("a text")
    (root / "b.txt").write_text("b text")
    (root / "in" / "up").symlink_to(root)
    (root / "also").symlink_to(root / "in")
    (root / "c.TXT").symlink_to(root / "b.txt")
    assert read(root) == [b"a text", b"b text"]


@pytest.mark.parametrize("kind", ["nothing", "itself", "pipe"])
def test_what_is_no_file_is_named(tmp_path, kind):
    (tmp_path / "a.txt").write_text("a text")
    odd = tmp_path / "odd.txt"
    {"nothing": lambda: odd.symlink_to("gone"), "itself": lambda: odd.symlink_to(odd), "pipe": lambda: os.mkfifo(odd)}[
        kind
    ]()
    assert "odd.txt" in complaint(tmp_path)


def test_files_left_out_are_told_and_empty_ones_are_no_documents(tmp_path):
    for name in ("a.txt", "b.TXT", "c.pdf", "d.pdf", "e.json.gz", "f"):
        (tmp_path / name).write_text(f"text of {name}")
    for name in ("empty.txt", "empty.jsonl", "empty.parquet"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "blank.jsonl").write_bytes(b'\n{"text": ""}\n\n')
    assert read(tmp_path) == [b"text of a.txt", b"text of b.TXT"]
    assert "(.pdf 2, .json 1, none 1)" in " ".join(TextFolder(path=str(tmp_path)).splits().notes)
    assert len(read(tmp_path, suffixes=(".pdf",))) == 2


def test_a_file_by_name_may_have_any_ending(tmp_path):
    (tmp_path / "dump").write_bytes(PACK[".zst"](LINES))
    assert read(tmp_path / "dump") == WANTED


def test_a_name_that_is_not_utf8(tmp_path):
    with open(os.fsencode(tmp_path) + b"/\xff.txt", "w") as file:
        file.write("a text")
    (tmp_path / "b.txt").write_text("b text")
    assert len(TextFolder(path=str(tmp_path)).digest()) == 64 and read(tmp_path) == [b"a text", b"b text"]
