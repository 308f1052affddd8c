"""The shared part of text data sets: tokenizer, loader, split."""

import abc
import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from engrax.data.config import (
    SPLIT_RULE,
    SPLITS,
    DataConfig,
    Documents,
    Loader,
    Share,
    Splits,
    check_loader_arguments,
    require,
)
from engrax.data.corpus import Corpus
from engrax.data.disk_corpus import DiskCorpus
from engrax.data.encoded import Document
from engrax.data.shards import Shards
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
    def _source(self, split: str) -> tuple[Documents, Callable[[Any], Document], int]:
        """Returns (random-access documents of a split, document -> `Document`, tokens to pack and shuffle together)."""

    @abc.abstractmethod
    def _texts(self, split: str) -> Documents:
        """Returns the texts of a split's documents (bytes or str), of the first ones at least."""

    def warnings(self) -> list[str]:
        """Warns of a tokenizer that does not reproduce the first documents of the splits."""
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

    def token_documents(self, split: str) -> Iterator[Document]:
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
        from engrax.data.stream import StreamedText

        check_loader_arguments(self, split, seed, epochs, align)
        share = Share.of(batch_size, process_index, process_count)
        same = {"seq_len": self.seq_len, "share": share, "seed": seed, "align": align, "target_bytes": target_bytes}
        if stream:
            documents, encode, _ = self._source(split)
            return StreamedText(documents, encode, **same)
        return self.packed(split, epochs=epochs, **same)

    def packed(self, split: str, **settings: Any) -> Any:
        """Returns the packed rows of a split (`engrax.data.pipeline.PackedText` has the settings)."""
        from engrax.data.pipeline import PackedText

        documents, encode, buffer_tokens = self._source(split)
        return PackedText(documents, encode, buffer_tokens=buffer_tokens, **settings)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig(TextConfig):
    """Base of the text data sets that are split by `engrax.data.split`."""

    validation_fraction: float = 0.05  # fraction of the documents of every size in the validation split

    def __post_init__(self):
        super().__post_init__()
        fraction = self.validation_fraction
        require(0.0 < fraction < 1.0, f"validation_fraction must lie between 0 and 1, not {fraction}.")

    @abc.abstractmethod
    def _corpus(self) -> Corpus | DiskCorpus:
        """Returns the documents; raises UserError if there are none."""

    def _last_corpus(self) -> Corpus | DiskCorpus:
        """Returns the documents as last found, for loaders: a validation pass must not list a folder again."""
        return self._corpus()

    def documents(self, split: str) -> list[bytes]:
        """Returns the documents of a split, in a fixed pseudo-random order."""
        check_loader_arguments(self, split, 0, None, 1)
        return self._corpus().split(self.validation_fraction)[split]

    def splits(self) -> Splits:
        """See `DataConfig.splits`."""
        return self._corpus().splits(self.validation_fraction)

    def digest(self) -> str:
        """Returns the SHA-256 of the manifest (path, size and SHA-256 of every file), the tokenizer and the split rule.
        Under another rule, validation may contain text that a run was trained on."""
        parts = (self._corpus().manifest, self.tokenizer.manifest, SPLIT_RULE)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def tokenize(self) -> tuple[Shards, ...]:
        """Writes the token shards if they are missing, and returns them. Loaders read them from then on."""
        return (self._corpus().tokenized(self.validation_fraction, self.tokenizer),)

    def _texts(self, split):
        from engrax.data import round_trip

        return self._corpus().first_texts(self.validation_fraction, split, round_trip.FIRST_DOCUMENTS)

    def _source(self, split):
        encoded = self._last_corpus().encoded(self.validation_fraction, self.tokenizer)
        return encoded[split], _identity, 1 << 24


def _identity(document: Document) -> Document:
    return document
