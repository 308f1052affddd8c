"""Types of tokens. Diagnostics per token are averaged by type, for example the load of each memory."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

FREQUENT = 12  # number of most frequent tokens that are types by default

_BYTES = {  # all other bytes are "other": control characters and non-ASCII
    "lower case": b"abcdefghijklmnopqrstuvwxyz",
    "upper case": b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "digit": b"0123456789",
    "space, tab": b" \t",
    "newline": b"\n\r",
    "bracket": b"()[]{}",
    "quote": b"\"'`",
    "operator": b"+-*/%=<>&|^~!@",
    "other punctuation": b".,:;?_#$\\",
}


class TokenTypes(NamedTuple):
    """The type of every token of some rows."""

    names: tuple[str, ...]
    index: Int[np.ndarray, "N T"]  # into names


def byte_types(tokens: Int[np.ndarray, "N T"]) -> TokenTypes:
    """Letters, digits, space, newlines, brackets, quotes, operators, other punctuation, other bytes."""
    table = np.full(256, len(_BYTES))
    for i, members in enumerate(_BYTES.values()):
        table[list(members)] = i
    return TokenTypes((*_BYTES, "other"), table[tokens])


def frequent_types(tokens: Int[np.ndarray, "N T"], real: Bool[np.ndarray, "N T"], name=str) -> TokenTypes:
    """One type, called `name(token)`, for each of the FREQUENT most frequent tokens, and one for all others."""
    ids, counts = np.unique(tokens[real], return_counts=True)
    kept = ids[np.argsort(-counts, kind="stable")[:FREQUENT]]
    index = np.full(tokens.shape, len(kept))
    for i, token in enumerate(kept):
        index[tokens == token] = i
    return TokenTypes((*(name(int(token)) for token in kept), "all others"), index)
