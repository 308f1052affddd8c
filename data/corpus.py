"""Corpora in memory: distinct documents, their split, and their tokens."""

import functools
import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from engrax.data import split
from engrax.data.config import SPLITS, Splits, require
from engrax.data.encoded import Encoded, encode_in_parts, joined
from engrax.data.tokenizers import Tokenizer


class Corpus:
    """Documents in memory. Exact copies count once, so no text is in both splits; empty documents are left out.

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
        """Returns the corpus of documents; those of `given` are its validation split, and are left out of train."""
        corpus = cls.__new__(cls)
        corpus._fill(manifest, contents, given, notes)
        return corpus

    def _fill(
        self, manifest: str, contents: Iterable[bytes], given: Iterable[bytes] | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.manifest = manifest
        self._notes = list(notes)
        held_out = _distinct(given or (), self._notes, "of the validation files")
        documents = _distinct(contents, self._notes)
        if given is not None:
            both = documents.keys() & held_out.keys()
            if both:
                self._notes.append(f"{len(both):,} document(s) of the validation files were left out of train.")
            documents = {key: text for key, text in documents.items() if key not in both}
        if given is None and len(documents) == 1:
            documents = self._sections(*documents.values())
        self._documents = dict(sorted((documents | held_out).items()))
        keys, texts = list(self._documents), self._documents.values()
        self._catalogue = split.Catalogue(
            np.array([split.place_of(key) for key in keys], np.float64),
            np.array([len(text) for text in texts], np.int64),
            None if given is None else np.array([key in held_out for key in keys], bool),
        )
        self.split = functools.lru_cache(maxsize=4)(self._split)
        self.encoded = functools.lru_cache(maxsize=4)(self._encoded)

    def _sections(self, text: bytes) -> dict[bytes, bytes]:
        parts = list(split.sections([text]))
        self._notes.append(
            f"the corpus is one document, cut into {len(parts)} sections of {split.SECTION // 1024} KiB."
            if len(parts) > 1
            else f"the corpus is one document shorter than {2 * split.SECTION // 1024} KiB, cut in two."
        )
        return _distinct(parts, self._notes)

    def __len__(self) -> int:
        return len(self._documents)

    def _split(self, validation_fraction: float) -> dict[str, list[bytes]]:
        """Returns the documents of both splits, in the order of their SHA-256, independent of names and paths."""
        texts = list(self._documents.values())
        if len(texts) == 1 and self._catalogue.given is None:
            head, tail = split.cut_in_two(texts[0], validation_fraction)
            return {"train": [head], "validation": [tail]}
        chosen = self._catalogue.validation(validation_fraction)
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
        return Splits(**sizes, notes=tuple(self._notes))

    def _encoded(self, validation_fraction: float, tokenizer: Tokenizer) -> dict[str, "EncodedDocuments"]:
        splits = self.split(validation_fraction)
        return {name: EncodedDocuments(documents, tokenizer) for name, documents in splits.items()}


def _distinct(texts: Iterable[bytes], notes: list[str], where: str = "") -> dict[bytes, bytes]:
    """Returns {SHA-256: text} of the texts that are not empty."""
    found: dict[bytes, bytes] = {}
    copies = 0
    for text in texts:
        if text:
            key = hashlib.sha256(text).digest()
            copies += key in found
            found[key] = text
    if copies:
        notes.append(f"{copies:,} exact cop{'ies' if copies > 1 else 'y'} {where} left out.".replace("  ", " "))
    return found


class EncodedDocuments:
    """A random-access source of `Encoded`, each made at its first use and kept in the smallest integer types."""

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
