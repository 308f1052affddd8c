"""Token shards: the tokens of a corpus on disk, written once and read at random.

The tokens of a split are one long sequence, cut into records of RECORD tokens in ArrayRecord files (the shards). A
record holds the tokens and, unless each token is one byte, the bytes of each. The first record of a shard names its
data and tokenizer. `SPLIT.places.npy` has the first token and the number of tokens of every document, and `index.json`
the rest. A process reads only the records that hold its own rows.

Shards are in a cache, `$ENGRAX_CACHE` or `~/.cache/engrax`. You may delete them at any time. A folder appears there
complete or not at all. One process writes it while the others wait.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engrax.data.config import SPLIT_RULE, SPLITS, Splits, TokenArray
from engrax.data.encoded import Encoded, encode_in_parts
from engrax.data.tokenizers import Tokenizer
from engrax.errors import UserError
from engrax.files import cache_folder

FORMAT = 1  # of the folder
RECORD = 1 << 13  # tokens
SHARD = 1 << 14  # records
_KEPT = 256  # records in memory


def header(manifest: str, validation_fraction: float, tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the identity of a corpus's shards: the digests of data and tokenizer, and the split."""
    return {"data": manifest, "tokenizer": tokenizer.manifest, "split": [SPLIT_RULE, validation_fraction]}


def folder_of(**header: Any) -> Path:
    """Returns the folder of the shards that a header (JSON-able: data, tokenizer, ...) describes."""
    text = json.dumps({"format": FORMAT} | header, sort_keys=True)
    return cache_folder() / "tokens" / hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock of a folder or file of the cache. The lock ends with the process."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Writer:
    """Writes the tokens of one split. `add` takes the documents in any order; the index determines a document's
    place."""

    def __init__(self, folder: Path, split: str, documents: int, dtype: np.dtype, header: dict[str, Any]):
        self._folder, self._split, self._header = folder, split, header
        self._tokens, self._bytes = np.zeros(RECORD, dtype), np.zeros(RECORD, np.int64)
        self._filled, self._records, self._file = 0, 0, None
        self._places = np.zeros((documents, 2), np.int64)

    def add(self, index: int, parts: Iterable[Encoded]) -> None:
        """Appends a document, the `index`-th of its split."""
        start = self._end
        for part in parts:
            at = 0
            while at < len(part):
                count = min(len(part) - at, RECORD - self._filled)
                here = slice(self._filled, self._filled + count)
                self._tokens[here], self._bytes[here] = part.tokens[at : at + count], part.bytes[at : at + count]
                self._filled, at = self._filled + count, at + count
                if self._filled == RECORD:
                    self._flush()
        self._places[index] = start, self._end - start

    @property
    def _end(self) -> int:
        return self._records * RECORD + self._filled

    def _flush(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        if self._records % SHARD == 0:
            self._close_file()
            name = shard_name(self._split, self._records // SHARD)
            self._file = ArrayRecordWriter(str(self._folder / name), "group_size:1")
            self._file.write(json.dumps(self._header | {"shard": name}, sort_keys=True).encode())
        tokens, counts = self._tokens[: self._filled], self._bytes[: self._filled]
        counts = counts[:0] if (counts == 1).all() else counts.astype(np.min_scalar_type(counts.max()))
        size = bytes([counts.dtype.itemsize if len(counts) else 0])
        little = (array.astype(array.dtype.newbyteorder("<")).tobytes() for array in (tokens, counts))
        self._file.write(b"".join([*little, size]))
        self._records, self._filled = self._records + bool(self._filled == RECORD), self._filled % RECORD

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def close(self) -> dict[str, int]:
        """Writes the remaining tokens and returns {"documents", "tokens"}."""
        tokens = self._end
        if self._filled:
            self._flush()
        self._close_file()
        np.save(self._folder / f"{self._split}.places.npy", self._places)
        return {"documents": len(self._places), "tokens": tokens}


def shard_name(split: str, number: int) -> str:
    """Returns the file name of a shard."""
    return f"{split}-{number:05}.array_record"


def write(
    folder: Path,
    texts: Iterable[tuple[str, int, Iterable[bytes]]],
    sizes: Splits,
    tokenizer: Tokenizer,
    header: dict[str, Any],
) -> None:
    """Writes the shards of (split, index in it, document in chunks), in any order, all or none."""
    _require_array_record()
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process: the caller holds the lock
    part.mkdir(parents=True)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    try:
        writers = {s: Writer(part, s, getattr(sizes, s).documents, dtype, header) for s in SPLITS}
        for split, index, chunks in texts:
            writers[split].add(index, encode_in_parts(tokenizer, chunks))
        found = {split: writer.close() for split, writer in writers.items()}
        index = {"format": FORMAT, "header": header, "dtype": dtype.name, "record": RECORD, "shard": SHARD}
        index |= {"splits": found, "sizes": dataclasses.asdict(sizes)}
        (part / "index.json").write_text(json.dumps(index, indent=1))
        part.rename(folder)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if isinstance(error, RuntimeError):  # from array_record, for example a full disk
            raise UserError(f"the token shards cannot be written: {_reason(error)}; see ENGRAX_CACHE.") from None
        raise


def _require_array_record() -> None:
    try:
        import array_record  # noqa: F401
    except ImportError:
        raise UserError(
            "token shards need the package array_record, which has no build for this system; use less text."
        ) from None


class Shards:
    """The shards in a folder. Raises UserError if they are damaged or of other data."""

    def __init__(self, folder: Path, header: dict[str, Any]):
        self.folder = folder
        try:
            self._index = json.loads((folder / "index.json").read_text())
            if self._index["header"] != header or self._index["format"] != FORMAT:
                raise ValueError("they are of other data")
            self._documents = {split: self._open(split, header) for split in SPLITS}
            self.sizes = Splits.from_dict(self._index["sizes"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder, error) from None

    def tokens(self, split: str) -> int:
        """Returns the number of tokens of a split."""
        return self._index["splits"][split]["tokens"]

    def documents(self) -> dict[str, "StoredDocuments"]:
        """Returns the documents of every split."""
        return self._documents

    def _open(self, split: str, header: dict[str, Any]) -> "StoredDocuments":
        import grain

        records = -(-self.tokens(split) // self._index["record"])
        names = [shard_name(split, number) for number in range(-(-records // self._index["shard"]))]
        places = np.load(self.folder / f"{split}.places.npy", mmap_mode="r")
        for name in names:
            if not (self.folder / name).is_file():
                raise ValueError(f"{name} is missing")
        try:
            source = grain.sources.ArrayRecordDataSource([str(self.folder / name) for name in names])
            firsts = range(0, len(source), self._index["shard"] + 1)
            heads = [json.loads(source[first]) for first in firsts]
        except Exception as error:  # the library raises many types, and bare ones
            raise ValueError(error) from None
        wanted = [header | {"shard": name} for name in names]
        if heads != wanted or len(source) != records + len(names):
            raise ValueError(f"the shards of {split} are not those that were written")
        return StoredDocuments(self.folder, source, places, np.dtype(self._index["dtype"]), self._index)


def damaged(folder: Path, error: Exception) -> UserError:
    """The error for shards that cannot be read."""
    return UserError(
        f"the token shards in {folder} are damaged ({_reason(error)}); delete the folder, it is written anew."
    )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


class StoredDocuments:
    """A random-access source of documents in shards. Only the sliced parts of a document are read."""

    def __init__(self, folder: Path, source: Any, places: np.ndarray, dtype: np.dtype, index: dict[str, Any]):
        self._folder, self._source, self._places = folder, source, places
        self._dtype, self._record, self._shard = dtype.newbyteorder("<"), index["record"], index["shard"]
        self._kept: OrderedDict[int, Encoded] = OrderedDict()  # the most recently used records
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> "StoredDocument":
        start, tokens = self._places[index].tolist()
        return StoredDocument(self, start, tokens)

    def read(self, start: int, stop: int) -> Encoded:
        """Returns the tokens [start, stop) of the split's sequence."""
        if stop <= start:
            empty = np.zeros(0, np.int32)
            return Encoded(empty, empty)
        first = start // self._record
        numbers = range(first, (stop - 1) // self._record + 1)
        with self._lock:
            records = self._records(numbers)
        here = slice(start - first * self._record, stop - first * self._record)
        return Encoded(*(np.concatenate([getattr(r, name) for r in records])[here] for name in ("tokens", "bytes")))

    def read_ahead(self, pieces: Iterable[tuple["StoredDocument", int, int]]) -> None:
        """Reads the records of pieces (document, first token, tokens) at once, ten times faster than one by one."""
        numbers: set[int] = set()
        for document, start, length in pieces:
            first, stop = document.start + start, document.start + min(start + length, len(document))
            numbers.update(range(int(first) // self._record, -(-int(stop) // self._record)))
        with self._lock:
            self._records(sorted(numbers)[:_KEPT])

    def _records(self, numbers: Sequence[int]) -> list[Encoded]:
        missing = [number for number in numbers if number not in self._kept]
        if missing:
            try:  # the first record of every shard identifies it
                found = self._source.__getitems__([number + number // self._shard + 1 for number in missing])
                self._kept |= {number: self._parsed(record) for number, record in zip(missing, found)}
            except Exception as error:  # the library raises many types, and bare ones
                raise damaged(self._folder, error) from None
        found = [self._kept[number] for number in numbers]
        for number in numbers:
            self._kept.move_to_end(number)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return found

    def _parsed(self, record: bytes) -> Encoded:
        count = (len(record) - 1) // (self._dtype.itemsize + record[-1])
        tokens = np.frombuffer(record, self._dtype, count)
        if not record[-1]:
            return Encoded(tokens, np.broadcast_to(np.uint8(1), tokens.shape))
        sizes = np.frombuffer(record, f"<u{record[-1]}", count, offset=tokens.nbytes)
        return Encoded(tokens, sizes)


@dataclasses.dataclass(frozen=True)
class StoredDocument:
    """A document in shards, read when `tokens` or `bytes` are sliced."""

    source: StoredDocuments
    start: int  # its first token in the split's sequence
    length: int  # tokens

    def __len__(self) -> int:
        return self.length

    @property
    def tokens(self) -> "_Slices":
        return _Slices(self, "tokens")

    @property
    def bytes(self) -> "_Slices":
        return _Slices(self, "bytes")


@dataclasses.dataclass(frozen=True)
class _Slices:
    document: StoredDocument
    name: str

    def __getitem__(self, chosen: slice) -> TokenArray:
        start, stop, _ = chosen.indices(self.document.length)
        first = self.document.start
        return getattr(self.document.source.read(first + start, first + stop), self.name)
