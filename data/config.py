"""The contract of every data set: a frozen config with a vocabulary size, a digest and loaders.

Axis letters: B rows of a batch, T tokens of a row, N examples, D documents.
"""

import abc
import dataclasses
import inspect
from typing import Any, ClassVar, NotRequired, Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int32, Integer

from engrax.data.token_types import TokenTypes, frequent_types
from engrax.errors import UserError
from engrax.registry import Registry

DATASETS = Registry("data", "engrax.data", word="data set")

SPLITS = ("train", "validation")
SPLIT_RULE = "split by size class"  # changes with every change of engrax.data.split that moves documents

IGNORE = -1  # in targets: no loss; in segment_ids: padding
FILLER = -2  # in segment_ids: an empty position that moves the next document to a multiple of `align`


TokenArray = Integer[np.ndarray, "..."]  # the tokens of one document, of any length


class Batch(TypedDict):
    """The batch of one process."""

    tokens: Int32[np.ndarray, "B T"]
    targets: Int32[np.ndarray, "B T"]  # -1 = no loss
    segment_ids: Int32[np.ndarray, "B T"]  # 0, 1, 2, ... within a row; -1 = padding after the tokens, -2 = filler
    target_bytes: NotRequired[Int32[np.ndarray, "B T"]]  # source bytes of the target, 0 = no target; only if requested


@runtime_checkable
class Loader(Protocol):
    """An iterator over batches; its position is a small JSON-able dict.

    `get_state()` is the position after the last returned batch. A loader with the same arguments and this state returns
    the next batch. All processes of a run have the same state. A text loader's state counts documents and rows, so it
    is also valid for another number of processes.
    """

    def __iter__(self) -> "Loader": ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...


@runtime_checkable
class Documents(Protocol):
    """A random-access source of documents. If it has `__getitems__(indices) -> list`, documents are read in groups."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Share:
    """The part of every global batch that one process yields: rows [start, start + rows) of `batch_size`."""

    batch_size: int  # rows of the global batch
    start: int  # first row of this process
    rows: int  # rows of this process

    @classmethod
    def of(cls, batch_size: int, process_index: int, process_count: int) -> "Share":
        """Returns the share of process `process_index`; raises UserError if the batch does not divide."""
        require(batch_size > 0, f"batch_size must be positive, not {batch_size}.")
        require(0 <= process_index < process_count, f"process_index {process_index} is not in [0, {process_count}).")
        require(
            batch_size % process_count == 0,
            f"batch_size {batch_size} does not divide by the {process_count} processes; "
            f"choose a multiple of {process_count}.",
        )
        rows = batch_size // process_count
        return cls(batch_size, process_index * rows, rows)


@dataclasses.dataclass(frozen=True)
class SplitSize:
    """The amount of text in a split."""

    documents: int
    bytes: int | None = None  # None = unknown without reading the whole data set
    lengths: tuple[int, int, int] | None = None  # bytes of the shortest, the median and the longest document

    def __str__(self) -> str:
        words = f"{self.documents:,} document{'s' * (self.documents != 1)}"
        if self.bytes is None:
            return words
        if self.lengths is None:
            return f"{words}, {self.bytes:,} bytes"
        shortest, median, longest = self.lengths
        return f"{words}, {self.bytes:,} bytes; shortest {shortest:,}, median {median:,}, longest {longest:,} bytes"


@dataclasses.dataclass(frozen=True)
class Splits:
    """The sizes of both splits, and notes on them, one sentence each."""

    train: SplitSize
    validation: SplitSize
    notes: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Splits":
        """The inverse of `dataclasses.asdict`, also after JSON."""
        sizes = (
            data[split] | {"lengths": data[split]["lengths"] and tuple(data[split]["lengths"])} for split in SPLITS
        )
        return cls(*(SplitSize(**size) for size in sizes), notes=tuple(data["notes"]))

    def rows(self) -> list[tuple[str, str]]:
        """The splits as (name, value), for a terminal and the evaluation report."""
        rows = [(f"{split} split", str(getattr(self, split))) for split in SPLITS]
        return rows + [("about the text", note) for note in self.notes]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig(abc.ABC):
    """Base of every data set's config. A subclass is a frozen dataclass, registered with `@engrax.register(name)`."""

    registry: ClassVar[Registry] = DATASETS
    registered_name: ClassVar[str] = ""
    even_epochs: ClassVar[bool] = True  # the endless order shows every row once before it repeats one

    seq_len: int = 512  # tokens per row

    def __post_init__(self):
        require(self.seq_len >= 2, f"seq_len must be at least 2 tokens, not {self.seq_len}.")

    @property
    def tokenizer(self):
        """The tokenizer (`engrax.data.tokenizers`), or None for a generated task."""
        return None

    @property
    def counts_bytes(self) -> bool:
        """Whether the loader takes `target_bytes`; if so, the data is text and scored in bits per byte."""
        return "target_bytes" in inspect.signature(self.loader).parameters

    def warnings(self) -> list[str]:
        """Sentences on why scores of this data may be wrong, for `describe`, training and the report of a run.

        Raises UserError if the data is missing.
        """
        return []

    def token_types(self, batch: Batch) -> TokenTypes:
        """Returns the type of every token, for diagnostics by type of token; types of padding are not used.

        The default is the tokenizer's types, or the most frequent tokens if there is no tokenizer. Tasks override it.
        """
        if hasattr(self.tokenizer, "token_types"):
            return self.tokenizer.token_types(batch["tokens"])
        name = str if self.tokenizer is None else lambda token: repr(self.tokenizer.decode([token]))
        return frequent_types(batch["tokens"], batch["segment_ids"] >= 0, name)

    def splits(self) -> Splits | None:
        """Returns the sizes of both splits of a text; None for a generated task. Raises UserError as `digest` does."""
        return None

    def about(self) -> list[tuple[str, str]]:
        """Returns what the data is made of as (name, value), for a terminal."""
        return []

    def sources(self, rows: Integer[np.ndarray, " N"]) -> TokenTypes | None:
        """Returns the names of the sources of a mixture, and the source of each of these rows; else None.

        `rows` are places in one pass over the validation split, from 0; after its end the source is -1. Where it is not
        None, `solve` takes the sources as its second argument.
        """
        return None

    @abc.abstractmethod
    def digest(self) -> str:
        """Returns the SHA-256 (hex) of the data; raises UserError if it is missing or empty."""

    @abc.abstractmethod
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
    ) -> Loader:
        """Returns an iterator over batches (`Batch`) of one process.

        The loader of a text data set also takes `target_bytes`: if true, every batch has the number of source bytes of
        each target (`engrax.data.encoded`).

        Args:
          split: "train" or "validation"; they share no document or example.
          batch_size: rows of the global batch, over all processes.
          seed: seed of the order; the data do not depend on it.
          process_index, process_count: this process yields the rows `[i * b, (i + 1) * b)` of every global batch, b =
          batch_size // process_count. In process order they form the batch that a single process would yield. epochs:
          None for an endless stream, reshuffled every epoch; n for n passes in one fixed order, where empty rows pad
          the last batch. align: text only: every packed document starts at a multiple of `align` tokens, which must
          divide seq_len.

        Raises:
          UserError: unknown split, a batch that does not divide, a bad seed, `epochs` or `align`, missing data.
        """


def check_loader_arguments(config: DataConfig, split: str, seed: int, epochs: int | None, align: int) -> None:
    """Raises UserError for invalid loader arguments."""
    require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
    require(seed >= 0, f"seed must not be negative, not {seed}.")
    require(epochs is None or epochs >= 1, f"epochs must be None (endless) or at least 1, not {epochs}.")
    require(
        align >= 1 and config.seq_len % align == 0,
        f"seq_len {config.seq_len} is not a multiple of align {align}; choose a seq_len that is.",
    )


def check_rows(segment_ids: Integer[np.ndarray, "B T"]) -> None:
    """Raises UserError if padding precedes a token or filler in a row, because training programs do not move
    padding."""
    wrong = np.argwhere((segment_ids[:, :-1] == IGNORE) & (segment_ids[:, 1:] != IGNORE))
    if len(wrong):
        row, place = map(int, wrong[0])
        raise UserError(
            f"row {row} of the data set's segment_ids has padding ({IGNORE}) at position {place} and "
            f"{segment_ids[row, place + 1]} after it; put padding after a row's last token, or mark it as filler "
            f"({FILLER})."
        )


def padding_batch(rows: int, seq_len: int, *, target_bytes: bool = False) -> Batch:
    """Returns a batch of padding (tokens and bytes 0, targets and segment_ids -1), to be filled with rows."""
    batch: Batch = {
        "tokens": np.zeros((rows, seq_len), np.int32),
        "targets": np.full((rows, seq_len), IGNORE, np.int32),
        "segment_ids": np.full((rows, seq_len), IGNORE, np.int32),
    }
    return batch | {"target_bytes": np.zeros((rows, seq_len), np.int32)} if target_bytes else batch


def require(condition: bool, sentence: str) -> None:
    """Raises UserError with `sentence` unless the condition holds."""
    if not condition:
        raise UserError(sentence)
