"""Packing: a plan that places documents of any length in rows of fixed length, computed from the lengths.

A document longer than a row fills whole rows. Its rest, and every shorter document, is not cut. Longest first, each
goes to the fullest row that has room (best-fit decreasing, as in Ding et al., "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830). Each piece is one segment of its row.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from engrax.data import hashing
from engrax.data.config import FILLER, Batch
from engrax.data.encoded import Document


@dataclasses.dataclass(frozen=True)
class Plan:
    """Pieces P of documents, sorted by row and position; row r holds pieces [first[r], first[r + 1])."""

    document: Int64[np.ndarray, "P"]  # index of the document
    start: Int64[np.ndarray, "P"]  # first token of the piece within its document
    length: Int64[np.ndarray, "P"]  # tokens of the piece
    offset: Int64[np.ndarray, "P"]  # position of its first token in the row
    first: Int64[np.ndarray, "R"]  # number of rows + 1 entries

    @property
    def rows(self) -> int:
        return len(self.first) - 1


def plan_rows(lengths: Int64[np.ndarray, "D"], seq_len: int, *, align: int = 1, keys: tuple[int, ...] = (0,)) -> Plan:
    """Returns the plan for documents of the given lengths (tokens); a document without tokens gets no piece.

    Args:
      lengths: tokens of each document.
      seq_len: tokens of a row, a multiple of `align`.
      align: every piece starts at a multiple of this many tokens.
      keys: integers that choose the random order of the rows.
    """
    document, start, length, row, rows = _cut(np.asarray(lengths, np.int64), seq_len)
    rest = np.flatnonzero(row < 0)
    need = -(-length[rest] // align)
    longest_first = np.argsort(-need, kind="stable")
    row[rest[longest_first]], rows = _best_fit(need[longest_first], seq_len // align, rows)
    row = hashing.permutation(rows, *keys)[row]
    order = np.lexsort((document, row))  # within a row, documents keep their order
    document, start, length, row = document[order], start[order], length[order], row[order]
    first = np.searchsorted(row, np.arange(rows + 1))
    room = -(-length // align) * align
    end = np.cumsum(room)
    offset = end - room - (end - room)[first[row]] if len(row) else end
    return Plan(document, start, length, offset, first)


def _cut(lengths: Int64[np.ndarray, "D"], seq_len: int):
    """Cuts documents into pieces of at most one row; each full piece gets its own row, the others row -1."""
    pieces = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_len
    length = np.minimum(lengths[document] - start, seq_len)
    full = length == seq_len
    row = np.where(full, np.cumsum(full) - 1, -1)
    return document, start, length, row, int(full.sum())


def _best_fit(need: Int64[np.ndarray, "P"], capacity: int, rows: int) -> tuple[Int64[np.ndarray, "P"], int]:
    """Returns a row for each piece, in the given order, and the number of rows; new rows are numbered from `rows`."""
    assigned = np.empty(len(need), np.int64)
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit s is set if some open row has exactly s units of room
    for i, units in enumerate(need.tolist()):
        fitting = rooms >> units
        if fitting:
            room = units + (fitting & -fitting).bit_length() - 1
            chosen = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, chosen, rows = capacity, rows, rows + 1
        assigned[i] = chosen
        if room > units:
            rows_with_room[room - units].append(chosen)
            rooms |= 1 << (room - units)
    return assigned, rows


def write_row(batch: Batch, i: int, plan: Plan, row: int, documents: list[Document]) -> None:
    """Writes row `row` of the plan into row i of a padding batch, with filler between its pieces.

    A token's target is the next token of its document, even if that token is in another row. The last token of a
    document has no target (-1).
    """
    end = 0
    for segment, p in enumerate(range(plan.first[row], plan.first[row + 1])):
        start, length, offset = int(plan.start[p]), int(plan.length[p]), int(plan.offset[p])
        write_piece(batch, i, offset, documents[plan.document[p]], start, length)
        batch["segment_ids"][i, end:offset] = FILLER
        batch["segment_ids"][i, offset : offset + length] = segment
        end = offset + length


def write_piece(batch: Batch, i: int, offset: int, document: Document, start: int, length: int) -> None:
    """Writes `length` tokens of a document from `start` on, with their targets, at `offset` of row i of a batch."""
    following = slice(start + 1, start + length + 1)
    targets = document.tokens[following]
    batch["tokens"][i, offset : offset + length] = document.tokens[start : start + length]
    batch["targets"][i, offset : offset + len(targets)] = targets
    if "target_bytes" in batch:
        batch["target_bytes"][i, offset : offset + len(targets)] = document.bytes[following]
