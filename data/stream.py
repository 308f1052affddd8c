"""Rows as streams: each row of a batch continues the same row of the previous batch.

This serves memories carried from batch to batch. Row r of B reads the documents r, r + B, r + 2 B, ... of an endless
shuffled order in sequence. `segment_ids` number them over the whole run, so a memory can tell where a document ends.
"""

from collections.abc import Callable
from typing import Any

import grain

from engrax.data import hashing
from engrax.data.config import FILLER, Batch, Documents, Share, padding_batch, require
from engrax.data.encoded import Document
from engrax.data.packing import write_piece
from engrax.errors import UserError


class StreamedText(grain.DatasetIterator):
    """Batches of streamed rows, a grain iterator. Its position is, for each row of the global batch, the document in
    the row's order and the next token in it. Documents start at multiples of `align` tokens."""

    def __init__(
        self,
        documents: Documents,
        encode: Callable[[Any], Document],
        *,
        seq_len: int,
        share: Share,
        seed: int,
        align: int,
        target_bytes: bool = False,
    ):
        super().__init__()
        require(len(documents) > 0, "the data set has no documents.")
        self._documents, self._encode = documents, encode
        self._seq_len, self._share, self._align, self._target_bytes = seq_len, share, align, target_bytes
        order = grain.MapDataset.range(len(documents))
        self._order = order.shuffle(seed=hashing.seed32(seed)).repeat(None)
        self._position = [[0, 0] for _ in range(share.batch_size)]
        self._open: dict[int, tuple[int, Document]] = {}  # the encoded current document of each row

    @property
    def document_count(self) -> int:
        """Number of documents in the split; the first this many of the endless order are distinct."""
        return len(self._documents)

    def get_state(self) -> dict[str, list[list[int]]]:
        """The position after the last returned batch."""
        return {"stream": [list(place) for place in self._position]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position; raises UserError if it belongs to other data or another batch size."""
        if set(state) != {"stream"} or len(state["stream"]) != self._share.batch_size:
            raise UserError("the saved data position does not belong to streams of this batch size.")
        self._position = [list(place) for place in state["stream"]]
        for row, (count, begin) in enumerate(self._position):
            sensible = type(count) is int and type(begin) is int and 0 <= count
            length = len(self._read(row, count * self._share.batch_size + row)) if sensible else 0
            require(sensible and 0 <= begin <= length, f"the saved data position {count}, {begin} is in no document.")

    def __next__(self) -> Batch:
        batch = padding_batch(self._share.rows, self._seq_len, target_bytes=self._target_bytes)
        for row in range(self._share.batch_size):
            self._fill(batch, row)
        return batch

    def _fill(self, batch: Batch, row: int) -> None:
        """Writes the next `seq_len` tokens of a row of the global batch; rows of other processes are skipped."""
        mine, at, empty = row - self._share.start, 0, 0
        while at < self._seq_len:
            count, begin = self._position[row]
            document = self._read(row, count * self._share.batch_size + row)
            empty = 0 if len(document) else empty + 1
            require(empty <= len(self._documents), "the data set has no text: every document is empty.")
            length = min(len(document) - begin, self._seq_len - at)
            done = begin + length == len(document)
            room = -(-length // self._align) * self._align if done else length  # the next document's start, from `at`
            if 0 <= mine < self._share.rows:
                write_piece(batch, mine, at, document, begin, length)
                batch["segment_ids"][mine, at : at + length] = count
                batch["segment_ids"][mine, at + length : at + room] = FILLER
            at += room
            self._position[row] = [count + 1, 0] if done else [count, begin + length]

    def _read(self, row: int, index: int) -> Document:
        if row not in self._open or self._open[row][0] != index:
            self._open[row] = index, self._encode(self._documents[self._order[index]])
        return self._open[row][1]
