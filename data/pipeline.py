"""The pipeline of all text data: shuffled documents -> tokens -> packed rows -> this process's batches.

An endless sequence of documents, reshuffled every epoch by grain's index shuffle (which needs no memory), is read in
groups of about `buffer_tokens` tokens. A group never crosses an epoch. It is packed as a whole, and its rows are
returned in random order. All this is a pure function of (seed, first document of the group), so the position is two
integers, equal on all processes. Every process reads all documents and builds only its own rows.
"""

import concurrent.futures
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import grain
import numpy as np

from engrax.data import hashing
from engrax.data.config import Batch, Documents, Share, padding_batch, require
from engrax.data.encoded import Document
from engrax.data.packing import Plan, plan_rows, write_row
from engrax.errors import UserError
from engrax.files import short

_READ_AT_ONCE = 64  # documents per read; a group is a whole number of reads, or ends with its epoch


@dataclasses.dataclass(frozen=True)
class _Group:
    documents: list[Document]
    plan: Plan
    end: int  # the document after the group's last one


class PackedText(grain.DatasetIterator):
    """Batches of packed rows (see the module). A grain iterator with get_state and set_state, which Orbax can save.

    Args:
      documents: a random-access source of inputs for `encode`.
      encode: document -> its tokens and their bytes; a pure function.
      seq_len, align: see `plan_rows`.
      share: the rows of each global batch to build.
      seed, epochs: see `DataConfig.loader`.
      buffer_tokens: tokens packed and shuffled together.
      target_bytes: the batches have this field.
    """

    def __init__(
        self,
        documents: Documents,
        encode: Callable[[Any], Document],
        *,
        seq_len: int,
        share: Share,
        seed: int,
        epochs: int | None,
        align: int,
        buffer_tokens: int,
        target_bytes: bool = False,
    ):
        super().__init__()
        self._reader = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="engrax-packing")
        self._documents, self._encode = documents, encode
        self._seq_len, self._align, self._share = seq_len, align, share
        self._seed, self._shuffled, self._buffer_tokens = seed, epochs is None, buffer_tokens
        self._target_bytes = target_bytes
        self._epoch_length = len(documents)
        require(self._epoch_length > 0, "the data set has no documents.")
        self._total = None if epochs is None else epochs * self._epoch_length
        order = grain.MapDataset.range(self._epoch_length)
        # grain adds the epoch to the seed: hash it, so runs with seeds 0 and 1 share no order.
        self._order = (order.shuffle(seed=hashing.seed32(seed)) if self._shuffled else order).repeat(epochs)
        self._ahead: tuple[int, concurrent.futures.Future[_Group]] | None = None  # the group being read in advance
        self._group: _Group | None = None
        self._document, self._row = 0, 0  # first document of the current group; its next row
        self._barren = 0  # groups without rows since the last one with rows

    def get_state(self) -> dict[str, int]:
        """The position after the last batch: the group's first document (counted across epochs) and the next row."""
        return {"document": self._document, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        """Continues from a position; raises UserError if it belongs to another kind of data set."""
        if set(state) != {"document", "row"} or any(type(n) is not int or n < 0 for n in state.values()):
            raise UserError(f"the saved data position {short(state)} does not belong to a text data set.")
        self._document, self._row = int(state["document"]), int(state["row"])
        self._group = None

    def close(self) -> None:
        """Stops reading ahead."""
        if not sys.is_finalizing():  # during finalisation Python has already stopped the reader
            self._reader.shutdown(wait=False, cancel_futures=True)
        super().close()

    def __next__(self) -> Batch:
        batch = padding_batch(self._share.rows, self._seq_len, target_bytes=self._target_bytes)
        filled, group = 0, None
        while filled < self._share.batch_size and self.next_length() is not None:
            if group is not self._group:
                group = self._group
                self._read_ahead(filled)
            self.write_next(batch, filled)
            filled += 1
        if not filled:
            raise StopIteration
        return batch

    def next_length(self) -> int | None:
        """Returns the tokens of the next row, None at the end of the last epoch. All processes know them."""
        if not self._advance():
            return None
        plan = self._group.plan
        return int(plan.length[plan.first[self._row] : plan.first[self._row + 1]].sum())

    def write_next(self, batch: Batch, row: int) -> None:
        """Writes the next row as the given row of the global batch, if it is this process's, and moves on."""
        mine = row - self._share.start
        if 0 <= mine < self._share.rows:
            write_row(batch, mine, self._group.plan, self._row, self._group.documents)
        self._row += 1

    def _read_ahead(self, filled: int) -> None:
        """Reads at once what this process needs of the current group for a batch that has `filled` rows."""
        if not hasattr(self._documents, "read_ahead"):
            return
        plan, first = self._group.plan, self._row + self._share.start - filled  # the row of this process's first one
        begin, end = max(first, self._row), min(first + self._share.rows, plan.rows)
        if begin < end:
            pieces = range(plan.first[begin], plan.first[end])
            documents = (self._group.documents[plan.document[p]] for p in pieces)
            self._documents.read_ahead([(d, plan.start[p], plan.length[p] + 1) for d, p in zip(documents, pieces)])

    def _advance(self) -> bool:
        """Moves to a group with a row left, if needed; returns False at the end of the last epoch."""
        while True:
            if self._total is not None and self._document >= self._total:
                return False
            if self._group is None:
                self._group = self._take(self._document)
            if self._row < self._group.plan.rows:
                self._barren = 0
                return True
            self._barren += self._group.end - self._document if not self._group.plan.rows else 0
            require(self._barren < self._epoch_length, "the data set has no text: every document is empty.")
            self._document, self._row, self._group = self._group.end, 0, None

    def _take(self, first: int) -> _Group:
        """Returns the group that starts at document `first` and starts reading the next one in the background."""
        if self._ahead is not None and self._ahead[0] == first:
            group = self._ahead[1].result()
        else:
            group = self._read(first)
        self._ahead = None
        if self._total is None or group.end < self._total:
            self._ahead = (group.end, self._reader.submit(self._read, group.end))
        return group

    def _read(self, first: int) -> _Group:
        """Reads, encodes and plans the group that starts at document `first`. A pure function: runs in any thread."""
        end_of_epoch = (first // self._epoch_length + 1) * self._epoch_length
        documents: list[Document] = []
        tokens, end = 0, first
        while end < end_of_epoch and tokens < self._buffer_tokens:
            stop = min(end + _READ_AT_ONCE, end_of_epoch)
            read = self._fetch([self._order[n] for n in range(end, stop)])
            documents += read
            tokens, end = tokens + sum(map(len, read)), stop
        lengths = np.array([len(document) for document in documents], np.int64)
        keys = (self._seed, first) if self._shuffled else (0, first % self._epoch_length)
        return _Group(documents, plan_rows(lengths, self._seq_len, align=self._align, keys=keys), end)

    def _fetch(self, indices: list[int]) -> list[Document]:
        if hasattr(self._documents, "__getitems__"):
            return [self._encode(document) for document in self._documents.__getitems__(indices)]
        return [self._encode(self._documents[index]) for index in indices]
