"""Documents of files: text, JSON Lines and Parquet, plain or compressed (gzip, bzip2, Zstandard).

The content decides the type of a file:

- The first bytes identify a compressed file and Parquet, under any name. Other formats that are not text are refused.
- JSON Lines: the name ends in .jsonl or .ndjson, or the first two lines are JSON objects (or the only one, if it has
  the field). Each line is a document; empty lines are skipped. In Parquet each row is a document. The text is in one
  field.
- Anything else is text, and each file is a document.

Text is checked as UTF-8, unless an encoding is given. A byte order mark at the start of a file is removed, and CRLF
becomes LF. Values of JSON Lines and Parquet are not changed.
"""

import bz2
import contextlib
import dataclasses
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from engrax.data import encodings
from engrax.data.config import require
from engrax.data.files import PACKED, open_bytes
from engrax.errors import UserError

_BLOCK = 1 << 20  # bytes read at once
_PARQUET_ROWS = 256  # read at once
_LINES = (".jsonl", ".ndjson")
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclasses.dataclass(frozen=True)
class Reader:
    """Reads the documents of a file (see the module)."""

    field: str | None = "text"  # of JSON Lines and Parquet; None = JSON Lines are read as text
    encoding: str | None = None  # None = UTF-8

    def documents(self, path: str) -> Iterator[Iterable[bytes]]:
        """Yields every document in chunks of UTF-8. Read them before you ask for the next document.

        Memory holds a block of a text, a line of JSON Lines, or some rows of Parquet. Raises UserError with the file
        and the line for unreadable content.
        """
        try:
            with open_bytes(path) as raw:
                magic = raw.read(4)
                raw.seek(0)
                if magic == b"PAR1":
                    yield from self._rows(path, raw)
                    return
                require(not path.lower().endswith(".parquet"), f"{path} is no Parquet file: it does not start as one.")
                with _decompressed(raw, magic) as stream:
                    yield from self._read(path, stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged or cut off: {_reason(error)}; restore it.") from None
        except OSError as error:
            if error.errno is not None:  # from the operating system: it names the file
                raise
            raise UserError(f"{path} is damaged or cut off: {_reason(error)}; restore it.") from None

    def _read(self, path: str, stream: Any) -> Iterator[Iterable[bytes]]:
        """Yields the documents of a text file, after decompression."""
        first = stream.read(_BLOCK)
        require(
            not first.startswith(_POINTER), f"{path} is a pointer of Git LFS, not the file itself; run `git lfs pull`."
        )
        encodings.refuse_binary(path, first, self.encoding)
        blocks = itertools.chain([first], iter(lambda: stream.read(_BLOCK), b""))
        text = encodings.utf8(path, blocks, self.encoding)
        head = next(text, b"")
        text = itertools.chain([head], text)
        if self.field is not None and self._is_lines(path, head, len(first) < _BLOCK):
            for number, line in enumerate(_lines(text), 1):
                if line.strip():
                    yield [self._value(line, f"line {number} of {path}")]
        else:
            yield encodings.unix_lines(text)

    def _is_lines(self, path: str, head: bytes, whole: bool) -> bool:
        name = path.lower()
        for ending in PACKED:
            name = name.removesuffix(ending)
        if name.endswith(_LINES):
            return True
        if not head.lstrip().startswith(b"{"):
            return False
        lines = [line for line in head.split(b"\n", 64)[: None if whole else -1] if line.strip()][:2]
        found = [_parsed(line) for line in lines]
        return bool(found) and all(isinstance(v, dict) for v in found) and (len(found) > 1 or self.field in found[0])

    def _value(self, line: bytes, where: str) -> bytes:
        found = _parsed(line)
        if isinstance(found, Exception):
            raise UserError(f"{where} is not JSON ({_reason(found)}); mend or remove it.")
        if not isinstance(found, dict):
            raise UserError(f"{where} is a JSON {_kind(found)}, not an object with a field {self.field!r}.")
        if self.field not in found:
            raise UserError(f"{where} has no field {self.field!r} (it has: {_names(found)}); set field to one of them.")
        return _utf8(found[self.field], self.field, where)

    def _rows(self, path: str, raw: Any) -> Iterator[Iterable[bytes]]:
        """Yields the rows of a Parquet file."""
        import pyarrow as pa
        from pyarrow import parquet

        require(self.field is not None, f"{path} is Parquet: set field to the name of the column that holds the text.")
        try:
            file = parquet.ParquetFile(raw, buffer_size=_BLOCK, pre_buffer=False)
            schema = file.schema_arrow
            if self.field not in schema.names:
                raise UserError(
                    f"{path} has no column {self.field!r} (it has: {_names(schema.names)}); set field to one of them."
                )
            kind = schema.field(self.field).type
            inner = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not any(str(inner) == name for name in ("string", "large_string", "string_view", "binary")):
                raise UserError(f"column {self.field!r} of {path} holds {kind}, not text; set field to another one.")
            row = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[self.field]):
                for value in batch.column(0):
                    row += 1
                    yield [_utf8(_scalar(value), self.field, f"row {row} of {path}")]
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is not readable Parquet: {_reason(error)}; restore it.") from None


def _scalar(value: Any) -> Any:
    """The Python value of a pyarrow scalar; bytes where a string is not UTF-8."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return error.object


def _utf8(value: Any, field: str, where: str) -> bytes:
    if isinstance(value, bytes):
        try:
            value.decode()
        except UnicodeDecodeError as error:
            raise UserError(f"{field!r} in {where} is not UTF-8 at byte {error.start}; mend or remove it.") from None
        return value
    if not isinstance(value, str):
        raise UserError(f"{field!r} in {where} is {_kind(value)}, not text; set field to another one, or mend it.")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{field!r} in {where} holds half a character (\\u{ord(value[error.start]):04x}); mend or remove it."
        ) from None


def _parsed(line: bytes) -> Any:
    """The JSON value of a line, or the error."""
    try:
        return json.loads(line.decode())
    except (ValueError, RecursionError) as error:
        return error


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def _names(fields: Iterable[str]) -> str:
    names = [str(name) for name in fields]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"


def _reason(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")


@contextlib.contextmanager
def _decompressed(raw: Any, magic: bytes) -> Iterator[Any]:
    """The content of a file, decompressed if its first bytes are those of a compressed file."""
    if magic.startswith(b"\x1f\x8b"):
        with gzip.GzipFile(fileobj=raw) as stream:
            yield stream
    elif magic.startswith(b"BZh"):
        with bz2.BZ2File(raw) as stream:
            yield stream
    elif magic == b"\x28\xb5\x2f\xfd":
        import pyarrow as pa

        with pa.CompressedInputStream(pa.PythonFile(raw), "zstd") as stream:
            yield stream
    else:
        yield raw


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a text, without their ends. Only LF ends a line, because JSON strings may contain other
    separators."""
    open_line = io.BytesIO()
    for block in blocks:
        *ended, rest = block.split(b"\n")
        for line in ended:
            open_line.write(line)
            yield open_line.getvalue()
            open_line = io.BytesIO()
        open_line.write(rest)
    yield open_line.getvalue()
