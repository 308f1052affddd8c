"""Any folder of text files, or a single file."""

import dataclasses
import functools

from etils import epath

from engrax.data import encodings
from engrax.data.config import DATASETS, require
from engrax.data.corpus import Corpus
from engrax.data.disk_corpus import DiskCorpus
from engrax.data.files import Listed, list_files, manifest_of
from engrax.data.sources import Reader
from engrax.data.text import CorpusConfig
from engrax.errors import UserError

IN_MEMORY = 64 << 20  # bytes of text; a larger corpus is tokenised into shards at its first use


@DATASETS.register("text_folder")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolder(CorpusConfig):
    """A folder of text, JSON Lines and Parquet files, plain or compressed; `gs://` and other paths of etils.epath work.

    Files are found at any depth; hidden ones are skipped. `engrax.data.sources` says how files become documents, and
    `engrax.data.split` how documents are split. A config's loaders read the folder as its first loader listed it, or as
    `digest`, `documents` or `splits` listed it later.
    """

    path: str = ""  # folder, or one file
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst", ".jsonl", ".ndjson", ".parquet")  # name endings; () = all files
    validation_path: str | None = None  # folder or file of your own validation split, left out of train
    field: str | None = "text"  # field of JSON Lines or column of Parquet; None = JSON Lines are read as text
    encoding: str | None = None  # of text and JSON Lines; None = UTF-8

    def __post_init__(self):
        super().__post_init__()
        require(self.path != "", "text_folder needs a path: the folder of text files (--data.path FOLDER).")
        require(self.field != "", "field is empty: name the field of JSON Lines that holds the text, or None.")
        if self.encoding is not None:
            encodings.check(self.encoding)

    def _corpus(self) -> Corpus | DiskCorpus:
        files, others = self._list(self.path)
        given, _ = (None, ()) if self.validation_path is None else self._list(self.validation_path)
        self.__dict__["_last"] = _read_files(files, given, Reader(self.field, self.encoding), others)
        return self._last

    def _last_corpus(self) -> Corpus | DiskCorpus:
        return self.__dict__["_last"] if "_last" in self.__dict__ else self._corpus()

    def _list(self, path: str) -> tuple[tuple[Listed, ...], tuple[tuple[str, int], ...]]:
        root = epath.Path(path)
        if not root.exists():
            raise UserError(f"text folder {path} does not exist.")
        files, others = list_files(root, self.suffixes)
        if not any(size for _, _, (size, _) in files):
            endings = f" ending in {', '.join(self.suffixes)}" if self.suffixes and root.is_dir() else ""
            raise UserError(f"text folder {path} holds no text: no non-empty file{endings} was found.")
        return files, others


@functools.lru_cache(maxsize=2)
def _read_files(
    files: tuple[Listed, ...],
    given: tuple[Listed, ...] | None,
    reader: Reader,
    others: tuple[tuple[str, int], ...],
) -> Corpus | DiskCorpus:
    """Reads files. Size and time of change are part of the cache key, so a changed file is read again."""
    notes = []
    if others:
        kinds = ", ".join(f"{ending} {count:,}" for ending, count in others[:6])
        notes.append(f"files of other endings were left out ({kinds}); see suffixes.")
    left = IN_MEMORY - sum(file.stamp[0] for file in files + (given or ()))
    contents = _contents(files, reader, IN_MEMORY) if left >= 0 else None
    held_out = None if given is None or contents is None else _contents(given, reader, IN_MEMORY)
    if contents is None or (given is not None and held_out is None):
        return DiskCorpus(files, given, reader, notes)
    corpus = Corpus.of(manifest_of(files, given, reader), contents, held_out, notes)
    require(len(corpus) > 0, "the text folder holds no text: every document is empty.")
    return corpus


def _contents(files: tuple[Listed, ...], reader: Reader, at_most: int) -> list[bytes] | None:
    """Returns the documents, or None if they have more than `at_most` bytes."""
    found = []
    for file in files:
        for chunks in reader.documents(file.path) if file.stamp[0] else ():
            pieces = []
            for chunk in chunks:
                pieces.append(chunk)
                at_most -= len(chunk)
                if at_most < 0:
                    return None
            found.append(b"".join(pieces))
    return found
