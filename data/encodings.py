"""Text as UTF-8. Another encoding is decoded if it is given, else the error names it. Files that are not text are
refused."""

import codecs
from collections.abc import Iterable, Iterator

from engrax.data.config import require
from engrax.errors import UserError

BOM = codecs.BOM_UTF8
_MARKS = {  # byte order marks, the longer ones first
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_FORMATS = {  # first bytes of files that are not text
    b"%PDF-": "a PDF file",
    b"PK\x03\x04": "a zip archive (also docx, epub, xlsx)",
    b"\xfd7zXZ\x00": "compressed with xz: use gzip, bzip2 or Zstandard",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GIF8": "an image",
    b"\x7fELF": "a program",
    b"PAR1": "Parquet that was compressed as a whole: decompress it, Parquet has codecs of its own",
    b"\x1f\x8b": "compressed twice",
    b"\x28\xb5\x2f\xfd": "compressed twice",
    b"BZh": "compressed twice",
    b"ARROW1": "an Arrow file",
    b"FEA1": "a Feather file",
    b"SQLite format 3": "a database",
}
# (encoding, first and last of its typical characters, their least share among the text's non-ASCII characters)
_GUESSES = (
    ("euc_jp", "\u3040", "\u30ff", 0.2),
    ("shift_jis", "\u3040", "\u30ff", 0.2),
    ("euc_kr", "\uac00", "\ud7a3", 0.7),
    ("gb18030", "\u4e00", "\u9fff", 0.7),
    ("koi8_r", "\u0430", "\u044f", 0.7),
    ("cp1251", "\u0430", "\u044f", 0.7),
)


def check(encoding: str) -> None:
    """Raises UserError for a name that is not a text encoding."""
    try:
        if codecs.getincrementaldecoder(encoding)("strict").decode(b"") != "":
            raise LookupError
    except (LookupError, UnicodeError, TypeError, AssertionError, ValueError):
        raise UserError(f"encoding {encoding!r} is unknown; give a name such as utf-16, cp1252 or shift_jis.") from None


def refuse_binary(path: str, first: bytes, encoding: str | None) -> None:
    """Raises UserError if a file's first block is UTF-16, UTF-32 or a format that is not text."""
    for magic, what in _FORMATS.items():
        require(not first.startswith(magic), f"{path} is no text: it is {what}; remove it or convert it.")
    if encoding is None:
        for mark, name in _MARKS.items():
            if first.startswith(mark):
                raise UserError(f"{path} is not UTF-8 but {name}: set encoding to {name}, or convert it.")
        _refuse_nul(path, first)


def _refuse_nul(path: str, block: bytes) -> None:
    if b"\0" not in block:
        return
    for start, name in ((1, "utf-16-le"), (0, "utf-16-be")):
        every_other, between = block[start::2], block[1 - start :: 2]
        if every_other.count(0) > len(every_other) // 3 and not between.count(0):
            raise UserError(f"{path} is not UTF-8 but perhaps {name}: set encoding to {name}, or convert it.")
    raise UserError(f"{path} is no text: it holds bytes of value 0; remove it or convert it.")


def utf8(path: str, blocks: Iterable[bytes], encoding: str | None) -> Iterator[bytes]:
    """Yields a text as UTF-8 without byte order mark. Raises UserError for bytes that are invalid in the encoding."""
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")("strict")
    begun, offset, block = False, 0, b""
    try:
        for block in blocks:
            text = decoder.decode(block)
            found = block if encoding is None else text.encode()
            found = found if begun else found.removeprefix(BOM)
            _refuse_nul(path, found)
            begun, offset = begun or bool(text), offset + len(block)
            if found:
                yield found
        decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise UserError(_complaint(path, error, offset, block, encoding)) from None


def _complaint(path: str, error: UnicodeError, offset: int, block: bytes, encoding: str | None) -> str:
    where = f"at or near byte {offset + getattr(error, 'start', 0):,}"
    if encoding is not None:
        return f"{path} is not {encoding} ({where}); set another encoding, or convert it."
    guess = _guess(block)
    return f"{path} is not UTF-8 ({where}), perhaps {guess}: set encoding to {guess}, or convert it."


def _guess(block: bytes) -> str:
    """The likely encoding of a text, judged by the characters that each encoding would give."""
    if sum(byte > 0x7F for byte in block) < 0.25 * len(block):
        return "cp1252"
    for name, first, last, least in _GUESSES:
        try:
            text = codecs.getincrementaldecoder(name)().decode(block)
        except UnicodeDecodeError:
            continue
        others = [character for character in text.lower() if character > "\x7f"]
        if sum(first <= character <= last for character in others) > least * len(others):
            return name
    return "cp1252"


def unix_lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the text with every CRLF as LF; a lone CR is kept."""
    held = b""
    for block in blocks:
        block = held + block
        held = b"\r" if block.endswith(b"\r") else b""
        found = block[: len(block) - len(held)].replace(b"\r\n", b"\n")
        if found:
            yield found
    if held:
        yield held
