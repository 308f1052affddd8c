"""Corpora larger than memory: streamed, tokenised once, and then read from token shards.

The first pass hashes every document. The hashes determine the split and the duplicates (24 bytes of memory per
document). The second pass encodes the documents into shards (`engrax.data.shards`). The cache keeps the result of the
first pass under the names, sizes and times of the files, so a tokenised corpus is not read again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from engrax.data import shards, split
from engrax.data.config import SPLIT_RULE, SPLITS, Splits, require
from engrax.data.files import Listed, manifest_of
from engrax.data.sources import Reader
from engrax.data.tokenizers import Tokenizer
from engrax.errors import UserError
from engrax.files import cache_folder

_SETTLED = 2.0  # seconds after its last change from which a file's size and time identify its content
_FIRST = 1 << 16  # bytes of a document that `first_texts` returns


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The destination of every scanned document, in the order of the scan."""

    index: Int64[np.ndarray, " N"]  # index in its split, -1 = left out
    validation: Bool[np.ndarray, " N"]
    keys: np.ndarray  # the first 8 bytes of its hash
    sections: bool  # the scanned items are sections of one document
    splits: Splits


class DiskCorpus:
    """The documents of files, split and described as in `engrax.data.corpus.Corpus`."""

    def __init__(
        self, files: tuple[Listed, ...], given: tuple[Listed, ...] | None, reader: Reader, notes: Sequence[str]
    ):
        self._files, self._given, self._reader, self._notes = files, given, reader, notes
        self.encoded = functools.lru_cache(maxsize=4)(self._encoded)

    @property
    def manifest(self) -> str:
        """The SHA-256 of the files and of the reader's settings."""
        return self._known("manifest", lambda: manifest_of(self._files, self._given, self._reader))

    def splits(self, validation_fraction: float) -> Splits:
        """Returns the sizes of both splits."""
        found = self._known(
            f"splits at {validation_fraction}", lambda: dataclasses.asdict(self._plan(validation_fraction).splits)
        )
        return Splits.from_dict(found)

    def split(self, validation_fraction: float) -> dict[str, list[bytes]]:
        """Returns the documents of both splits, in the order of their SHA-256, all in memory."""
        plan = self._plan(validation_fraction)
        found = {s: [b""] * getattr(plan.splits, s).documents for s in SPLITS}
        for name, index, chunks in self._placed(plan):
            found[name][index] = b"".join(chunks)
        return found

    def first_texts(self, validation_fraction: float, name: str, count: int) -> list[bytes]:
        """Returns the start of the first documents of the files, in either split."""
        found = []
        for _, chunks in self._documents(sections=False):
            found.append(next(iter(chunks), b"")[:_FIRST])
            if len(found) == count:
                break
        return found

    def tokenized(self, validation_fraction: float, tokenizer: Tokenizer) -> shards.Shards:
        """Returns the token shards. Writes them if they are missing."""
        header = shards.header(self.manifest, validation_fraction, tokenizer)
        folder = shards.folder_of(**header)
        with shards.locked(folder):
            if not folder.exists():
                print(f"the text is tokenised once, into {folder}", file=sys.stderr)
                plan = self._plan(validation_fraction)
                with _bar("tokenising", sum(getattr(plan.splits, s).bytes for s in SPLITS)) as tick:
                    shards.write(folder, self._placed(plan, tick), plan.splits, tokenizer, header)
        return shards.Shards(folder, header)

    def _encoded(self, validation_fraction: float, tokenizer: Tokenizer) -> dict[str, shards.StoredDocuments]:
        return self.tokenized(validation_fraction, tokenizer).documents()

    def _documents(self, sections: bool) -> Iterator[tuple[bool, Iterable[bytes]]]:
        """Yields (whether it is of the validation files, document in chunks), the validation files first."""
        for listed, of_given in ((self._given or (), True), (self._files, False)):
            for file in listed:
                for chunks in self._reader.documents(file.path) if file.stamp[0] else ():
                    if not sections:
                        yield of_given, chunks
                        continue
                    parts = split.sections(chunks)
                    first = next(parts, None)
                    if first is not None:  # all other documents are copies of it
                        yield from ((False, [part]) for part in (first, *parts))
                        return

    def _plan(self, validation_fraction: float) -> _Plan:
        plan = self._planned(validation_fraction, self._notes, sections=False)
        if sum(getattr(plan.splits, s).documents for s in SPLITS) == 1 and self._given is None:
            plan = self._planned(validation_fraction, plan.splits.notes, sections=True)
        for s in SPLITS:
            require(getattr(plan.splits, s).documents > 0, f"the corpus leaves nothing for the {s} split.")
        return plan

    def _planned(self, validation_fraction: float, notes: Sequence[str], sections: bool) -> _Plan:
        given, high, low, sizes = array("b"), array("Q"), array("Q"), array("q")
        with _bar("reading", None) as tick:
            for of_given, chunks in self._documents(sections):
                digest, size = hashlib.sha256(), 0
                for chunk in chunks:
                    digest.update(chunk)
                    size += len(chunk)
                    tick(len(chunk))
                key = digest.digest()
                given.append(of_given)
                high.append(int.from_bytes(key[:8], "big"))
                low.append(int.from_bytes(key[8:16], "big"))
                sizes.append(size)
        arrays = (np.frombuffer(a, t) for a, t in ((given, np.int8), (high, "u8"), (low, "u8"), (sizes, "i8")))
        return self._arranged(*arrays, validation_fraction, notes, sections)

    def _arranged(
        self, given, high, low, sizes, validation_fraction: float, notes: Sequence[str], sections: bool
    ) -> _Plan:
        """The plan. Its inputs: whether each document is of the validation files, its hash and its bytes."""
        filled = np.flatnonzero(sizes)
        require(len(filled) > 0, "the text folder holds no text: every document is empty.")
        order = filled[np.lexsort((low[filled], high[filled]))]  # stable: of copies, the validation files' come first
        new = np.ones(len(order), bool)
        new[1:] = (high[order][1:] != high[order][:-1]) | (low[order][1:] != low[order][:-1])
        distinct = order[new]
        if self._given is not None:
            held = given[distinct].astype(bool)
        elif len(distinct) == 1:
            held = np.zeros(1, bool)
        else:
            held = split.choose((high[distinct] >> 16) / 2.0**48, sizes[distinct], validation_fraction)
        index, validation = np.full(len(sizes), -1), np.zeros(len(sizes), bool)
        validation[distinct] = held
        for members in (distinct[held], distinct[~held]):
            index[members] = np.arange(len(members))
        group = np.cumsum(new) - 1
        both = int(np.sum(held & (np.bincount(group, weights=1 - given[order]) > 0))) if self._given is not None else 0
        found = split.notes(len(order) - len(distinct) - both, both, len(order) if sections else None)
        train, held_out = (split.size_of(sizes[members]) for members in (distinct[~held], distinct[held]))
        return _Plan(index, validation, high, sections, Splits(train, held_out, (*notes, *found)))

    def _placed(self, plan: _Plan, tick=lambda size: None) -> Iterator[tuple[str, int, Iterable[bytes]]]:
        """Yields (split, index in it, chunks) of every document that is not left out.

        Raises UserError if a document has changed since the scan.
        """
        for place, (_, chunks) in enumerate(self._documents(plan.sections)):
            require(place < len(plan.index), "the corpus grew while it was read; start again.")
            if plan.index[place] >= 0:
                hashed = _Hashed(chunks, tick)
                yield SPLITS[int(plan.validation[place])], int(plan.index[place]), hashed
                hashed.check(int(plan.keys[place]))

    def _known(self, name: str, find: Any) -> Any:
        """The result of `find()` (JSON-able). It is cached once the files have stopped changing."""
        files = (*self._files, *(self._given or ()))
        read_as = [shards.FORMAT, SPLIT_RULE, dataclasses.astuple(self._reader), [*self._notes]]
        key = hashlib.sha256(json.dumps([self._files, self._given, read_as]).encode()).hexdigest()[:32]
        path = cache_folder() / "corpora" / f"{key}.json"
        with shards.locked(path):
            found = _read_json(path)
            if name not in found:
                began = time.time()
                found[name] = find()
                if max(file.stamp[1] for file in files) / 1e9 < began - _SETTLED:
                    part = path.with_suffix(".part")
                    part.write_text(json.dumps(found))
                    part.replace(path)
        return found[name]


class _Hashed:
    """The chunks of a document, to be read once and hashed while they are read."""

    def __init__(self, chunks: Iterable[bytes], tick: Any):
        self._chunks, self._tick, self._digest = chunks, tick, hashlib.sha256()

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._digest.update(chunk)
            self._tick(len(chunk))
            yield chunk

    def check(self, key: int) -> None:
        """Raises UserError if the text read has another hash."""
        if int.from_bytes(self._digest.digest()[:8], "big") != key:
            raise UserError("the corpus changed while it was read; start again.")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):  # missing or damaged: compute it again
        return {}
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _bar(what: str, total: int | None):
    """A progress bar on stderr over bytes of text; yields tick(bytes)."""
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5, disable=None) as bar:
        yield bar.update
