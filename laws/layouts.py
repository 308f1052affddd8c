"""The rows that the laws run on: packed segments, and padding where the contract allows it.

Segment ids [B, T] are int32 and non-decreasing over the tokens of a row, -1 on padding. A mixer gets padding only after
a row's last token; a model gets it anywhere.
"""

import numpy as np

ROWS = 3  # batch rows of every law


def _lay_out(rows, length: int) -> np.ndarray:
    """Ids [rows, length] from runs of (id, number of tokens); None = the rest of the row."""
    ids = []
    for row in rows:
        rest = length - sum(n or 0 for _, n in row)
        ids.append(np.concatenate([np.full(rest if n is None else n, i) for i, n in row]))
    return np.stack(ids).astype(np.int32)


def packed_ids(chunk: int, length: int, *, padding: bool) -> np.ndarray:
    """Ids [ROWS, length] with boundaries on and off the chunk grid. With `padding`, also filler (-2) before, between
    and inside segments, and padding (-1) after them."""
    if padding:
        rows = (
            [(0, chunk + 3), (1, 1), (2, chunk - 1), (6, None), (-1, 2)],
            [(-2, 2), (0, chunk - 2), (4, chunk - 1), (-2, 3), (5, 2), (-2, 1), (5, None)],
            [(3, 2 * chunk), (9, None)],
        )
    else:
        rows = (
            [(0, chunk + 3), (1, 1), (2, chunk - 1), (6, None)],
            [(0, chunk - 2), (4, chunk - 1), (5, None)],
            [(3, 2 * chunk), (9, None)],
        )
    return _lay_out(rows, length)


def trailing_padding(ids: np.ndarray, tokens) -> np.ndarray:
    """The ids with padding after the first `tokens[b]` positions of row b."""
    return np.where(np.arange(ids.shape[1]) < np.asarray(tokens)[:, None], ids, -1).astype(np.int32)


def scattered_padding(tokens: int, length: int) -> np.ndarray:
    """Positions [ROWS, tokens], increasing, of a row's tokens among `length` positions. The others are padding: before,
    inside and after the tokens; only after them; only before them."""
    gap = length - tokens
    head, inside = gap // 3, gap // 3
    half = tokens // 2
    everywhere = np.concatenate([head + np.arange(half), head + inside + np.arange(half, tokens)])
    return np.stack([everywhere, np.arange(tokens), gap + np.arange(tokens)])


def with_gap(at: int, length: int, gap: int) -> np.ndarray:
    """Ids [ROWS, length] with the id `gap`, of padding or filler, on both sides of position `at`: between two
    documents, before the first token, and inside a document."""
    return _lay_out(
        (
            [(0, at - 2), (gap, 4), (1, None)],
            [(gap, at + 1), (0, None)],
            [(0, 3), (gap, at - 1), (0, None)],
        ),
        length,
    )
