"""Corpora in memory: distinct documents, their split, and their tokens."""

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from engrax.data import shards, split
from engrax.data.config import SPLITS, Documents, Splits, require
from engrax.data.encoded import Encoded, encode_in_parts, joined
from engrax.data.tokenizers import Tokenizer


class Corpus:
    """Documents in memory. Exact duplicates count once, so no text is in both splits. Empty documents are left out.

    `split(fraction)`, `splits(fraction)` and `encoded(fraction, tokenizer)` are computed once for each argument.
    """

    def __init__(self, files: Sequence[tuple[str, bytes]]):
        """Takes (relative path, content) of every file, in a fixed order; each is a document."""
        contents = [content for _, content in files]
        lines = [f"{path}\t{len(text)}\t{hashlib.sha256(text).hexdigest()}\n" for path, text in files]
        self._fill(hashlib.sha256("".join(lines).encode()).hexdigest(), contents)

    @classmethod
    def of(
        cls,
        manifest: str,
        contents: Iterable[bytes],
        given: Iterable[bytes] | None = None,
        notes: Sequence[str] = (),
    ) -> "Corpus":
        """Returns the corpus of documents. Those of `given` are its validation split and are left out of train."""
        corpus = cls.__new__(cls)
        corpus._fill(manifest, contents, given, notes)
        return corpus

    def _fill(
        self, manifest: str, contents: Iterable[bytes], given: Iterable[bytes] | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.manifest = manifest
        held_out, copies = _distinct(given or ())
        documents, more = _distinct(contents)
        shared = documents.keys() & held_out.keys()
        parts = None
        if given is None and len(documents) == 1:
            sections = list(split.sections(documents.values()))
            parts = len(sections)
            documents, again = _distinct(sections)
            copies += again
        self._notes = (*notes, *split.notes(copies + more, len(shared), parts))
        self._documents = dict(sorted((documents | held_out).items()))
        keys = list(self._documents)
        self._places = np.array([split.place_of(key) for key in keys], np.float64)
        self._sizes = np.array([len(text) for text in self._documents.values()], np.int64)
        self._given = None if given is None else np.array([key in held_out for key in keys], bool)
        self.split = functools.lru_cache(maxsize=4)(self._split)
        self.encoded = functools.lru_cache(maxsize=4)(self._encoded)

    def __len__(self) -> int:
        return len(self._documents)

    def _split(self, validation_fraction: float) -> dict[str, list[bytes]]:
        """Returns the documents of both splits, in the order of their SHA-256, independent of names and paths."""
        texts = list(self._documents.values())
        if len(texts) == 1 and self._given is None:
            head, tail = split.cut_in_two(texts[0], validation_fraction)
            return {"train": [head], "validation": [tail]}
        chosen = self._given
        if chosen is None:
            chosen = split.choose(self._places, self._sizes, validation_fraction)
        found = {name: [t for t, c in zip(texts, chosen) if c == (name == "validation")] for name in SPLITS}
        require(bool(found["train"]), "the validation files hold every document: nothing is left to train on.")
        require(bool(found["validation"]), "the validation files hold no text.")
        return found

    def splits(self, validation_fraction: float) -> Splits:
        """Returns the sizes of both splits."""
        sizes = {
            name: split.size_of(np.array([len(text) for text in texts], np.int64))
            for name, texts in self.split(validation_fraction).items()
        }
        return Splits(**sizes, notes=self._notes)

    def first_texts(self, validation_fraction: float, name: str, count: int) -> list[bytes]:
        """Returns the first documents of a split."""
        return self.split(validation_fraction)[name][:count]

    def tokenized(self, validation_fraction: float, tokenizer: Tokenizer) -> shards.Shards:
        """Returns the token shards. Writes them if they are missing."""
        header = shards.header(self.manifest, validation_fraction, tokenizer)
        folder = shards.folder_of(**header)
        with shards.locked(folder):
            if not folder.exists():
                splits = self.split(validation_fraction)
                texts = ((name, i, [text]) for name, found in splits.items() for i, text in enumerate(found))
                shards.write(folder, texts, self.splits(validation_fraction), tokenizer, header)
        return shards.Shards(folder, header)

    def _encoded(self, validation_fraction: float, tokenizer: Tokenizer) -> dict[str, Documents]:
        header = shards.header(self.manifest, validation_fraction, tokenizer)
        folder = shards.folder_of(**header)
        if folder.exists():
            return shards.Shards(folder, header).documents()
        splits = self.split(validation_fraction)
        return {name: EncodedDocuments(documents, tokenizer) for name, documents in splits.items()}


def _distinct(texts: Iterable[bytes]) -> tuple[dict[bytes, bytes], int]:
    """Returns {SHA-256: text} of the texts that are not empty, and the number of exact copies."""
    found: dict[bytes, bytes] = {}
    copies = 0
    for text in filter(None, texts):
        key = hashlib.sha256(text).digest()
        copies += key in found
        found[key] = text
    return found, copies


class EncodedDocuments:
    """A random-access source of `Encoded`. Each is computed at its first use and kept in the smallest integer types."""

    def __init__(self, documents: Sequence[bytes], tokenizer: Tokenizer):
        self._dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        self._documents, self._tokenizer = documents, tokenizer
        self._encoded: list[Encoded | None] = [None] * len(documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Encoded:
        if self._encoded[index] is None:
            parts = list(encode_in_parts(self._tokenizer, [self._documents[index]]))
            found = parts[0] if len(parts) == 1 else joined(parts)
            self._encoded[index] = Encoded(found.tokens.astype(self._dtype), found.bytes)
        return self._encoded[index]
