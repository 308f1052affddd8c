"""The shared part of text data sets: tokenizer, loader, and corpora of documents in memory."""

import abc
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from engrax.data.config import SPLITS, DataConfig, Documents, Loader, Share, check_loader_arguments, require
from engrax.data.encoded import Encoded
from engrax.data.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(DataConfig):
    """Base of the text data sets: documents, a tokenizer and the packing pipeline."""

    tokenizer_file: str | None = None  # path of a Hugging Face tokenizer.json; None = bytes

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UserError for a missing or damaged file."""
        return load_tokenizer(self.tokenizer_file)

    @property
    def vocab_size(self) -> int:
        """The vocabulary size in tokens."""
        return self.tokenizer.vocab_size

    @abc.abstractmethod
    def _source(self, split: str) -> tuple[Documents, Callable[[Any], Encoded], int]:
        """Returns (random-access documents of a split, document -> `Encoded`, tokens to pack and shuffle together)."""

    @abc.abstractmethod
    def _texts(self, split: str) -> Documents:
        """Returns the texts of a split's documents (bytes or str)."""

    def warnings(self) -> list[str]:
        """Names a tokenizer that does not give back the first documents of the splits."""
        from engrax.data import round_trip

        if self.tokenizer_file is None:
            return []
        texts = [self._texts(split) for split in SPLITS]
        first = (found[i] for found in texts for i in range(min(len(found), round_trip.FIRST_DOCUMENTS)))
        change = round_trip.first_change(self.tokenizer, first)
        if change is None:
            return []
        return [
            f"tokenizer {self.tokenizer_file} does not give back its text: {change[0]!r} comes back as {change[1]!r}. "
            "Bits per byte divide by the bytes of the text itself, and what the tokenizer drops costs no bits."
        ]

    def token_documents(self, split: str) -> Iterator[Encoded]:
        """Yields the whole documents of a split as tokens, with the bytes of each token."""
        check_loader_arguments(self, split, 0, None, 1)
        documents, encode, _ = self._source(split)
        return (encode(documents[i]) for i in range(len(documents)))

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        epochs: int | None = None,
        align: int = 1,
        stream: bool = False,
        target_bytes: bool = False,
    ) -> Loader:
        """See `DataConfig.loader`. The position counts documents and rows, for any number of processes.

        With `stream`, each row of a batch continues the same row of the previous batch (`StreamedText`). With
        `target_bytes`, the batches have this field (`Batch`).
        """
        from engrax.data.pipeline import PackedText
        from engrax.data.stream import StreamedText

        check_loader_arguments(self, split, seed, epochs, align)
        share = Share.of(batch_size, process_index, process_count)
        documents, encode, buffer_tokens = self._source(split)
        same = {"seq_len": self.seq_len, "share": share, "seed": seed, "align": align, "target_bytes": target_bytes}
        if stream:
            return StreamedText(documents, encode, **same)
        return PackedText(documents, encode, epochs=epochs, buffer_tokens=buffer_tokens, **same)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig(TextConfig):
    """Base of the text data sets with documents in memory."""

    validation_fraction: float = 0.05  # maximal fraction of the bytes in the validation split

    def __post_init__(self):
        super().__post_init__()
        fraction = self.validation_fraction
        require(0.0 < fraction < 1.0, f"validation_fraction must lie between 0 and 1, not {fraction}.")

    @abc.abstractmethod
    def _corpus(self) -> "Corpus":
        """Returns the documents; raises UserError if there are none."""

    def documents(self, split: str) -> list[bytes]:
        """Returns the documents of a split, in a fixed pseudo-random order."""
        check_loader_arguments(self, split, 0, None, 1)
        return self._corpus().split(self.validation_fraction)[split]

    def digest(self) -> str:
        """Returns the SHA-256 of the manifest (path, size and SHA-256 of every file) and of the tokenizer."""
        return hashlib.sha256(f"{self._corpus().manifest}\n{self.tokenizer.manifest}".encode()).hexdigest()

    def _texts(self, split):
        return self.documents(split)

    def _source(self, split):
        encoded = self._corpus().encoded(self.validation_fraction, self.tokenizer)
        return encoded[split], _identity, 1 << 24


class Corpus:
    """Files in memory as distinct documents: exact copies count once, so no text is in both splits."""

    def __init__(self, files: Sequence[tuple[str, bytes]]):
        """Takes (relative path, content) of every file, in a fixed order; empty files are skipped."""
        lines = []
        self._documents: dict[bytes, bytes] = {}  # SHA-256 -> content
        for path, content in files:
            key = hashlib.sha256(content).digest()
            lines.append(f"{path}\t{len(content)}\t{key.hex()}\n")
            if content:
                self._documents[key] = content
        self.manifest = hashlib.sha256("".join(lines).encode()).hexdigest()
        self.split = functools.lru_cache(maxsize=4)(self._split)
        self.encoded = functools.lru_cache(maxsize=4)(self._encoded)

    def __len__(self) -> int:
        return len(self._documents)

    def _split(self, validation_fraction: float) -> dict[str, list[bytes]]:
        """Splits by document, in the order of the contents' SHA-256, independent of names and paths.

        In that order each document joins the validation split if it fits into its share of the bytes; if none fits, the
        smallest joins. A single document is cut in two, at the end of a line if one is near; its tail is the validation
        split.
        """
        contents = [self._documents[key] for key in sorted(self._documents)]
        budget = int(validation_fraction * sum(map(len, contents)))
        if len(contents) == 1:
            require(len(contents[0]) > 1, "the text is a single byte: too short to be split into train and validation.")
            head, tail = _cut_in_two(contents[0], budget)
            return {"train": [head], "validation": [tail]}
        train, validation = [], []
        for content in contents:
            fits = len(content) <= budget
            (validation if fits else train).append(content)
            budget -= len(content) if fits else 0
        if not validation:
            validation.append(train.pop(train.index(min(train, key=len))))
        if not train:
            train.append(validation.pop(validation.index(max(validation, key=len))))
        return {"train": train, "validation": validation}

    def _encoded(self, validation_fraction: float, tokenizer: Tokenizer) -> dict[str, "EncodedDocuments"]:
        splits = self.split(validation_fraction)
        return {name: EncodedDocuments(documents, tokenizer) for name, documents in splits.items()}


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
            found = self._tokenizer.encode_with_bytes(self._documents[index])
            self._encoded[index] = Encoded(found.tokens.astype(self._dtype), found.bytes)
        return self._encoded[index]


def _cut_in_two(content: bytes, budget: int) -> tuple[bytes, bytes]:
    """Returns head and tail; the tail has at most `budget` bytes, at least half of that and at least 1."""
    cut = min(max(len(content) - budget, 1), len(content) - 1)
    end_of_line = content.find(b"\n", cut, cut + budget // 2)
    cut = cut if end_of_line < 0 else end_of_line + 1
    return content[:cut], content[cut:]


def _identity(document: Encoded) -> Encoded:
    return document
