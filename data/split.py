"""The split of a corpus into train and validation: a fair sample of every size, stable when files are added.

Documents are grouped in size classes: powers of 4 bytes. In each class, the documents with a hash below
`validation_fraction` go to validation. If there is none and the class has two documents or more, the one with the
smallest hash goes there. An added file therefore moves at most one other document of a class. If no document were in
validation, the smallest one goes there; if all were, the longest stays in train.

A corpus of one document is cut into sections of 64 KiB, which are split in the same way. A document shorter than two
sections is cut in two, and its tail is the validation split.
"""

from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Float64, Int64

from engrax.data.config import SplitSize, require
from engrax.data.encoded import character_start

SECTION = 64 * 1024  # bytes of a section, at least
_TO_LINE_END = 4 * 1024  # bytes by which a section may be longer, to end with a line


def place_of(digest: bytes) -> float:
    """Returns the place of a content's SHA-256 in [0, 1)."""
    return int.from_bytes(digest[:6], "big") / 2**48


def choose(
    places: Float64[np.ndarray, " D"], sizes: Int64[np.ndarray, " D"], fraction: float
) -> Bool[np.ndarray, " D"]:
    """Returns which of two or more documents are in the validation split (see the module)."""
    chosen = places < fraction
    classes = (np.frexp(sizes)[1] - 1) // 2  # class c: from 4^c up to 4^(c + 1) bytes
    for members in (np.flatnonzero(classes == c) for c in np.unique(classes)):
        if len(members) > 1 and not chosen[members].any():
            chosen[members[np.argmin(places[members])]] = True
    if not chosen.any():
        chosen[np.argmin(sizes)] = True
    if chosen.all():
        chosen[np.argmax(sizes)] = False
    return chosen


def sections(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Cuts a document, given in chunks of any size, into sections of SECTION bytes or slightly more.

    A section ends with a line if one ends soon, else with a UTF-8 character. The last section is shorter than two
    sections.
    """
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        while len(rest) >= 2 * SECTION + _TO_LINE_END:
            cut = _section_end(rest)
            yield bytes(rest[:cut])
            del rest[:cut]
    while len(rest) >= 2 * SECTION:
        cut = _section_end(rest)
        yield bytes(rest[:cut])
        del rest[:cut]
    if rest:
        yield bytes(rest)


def _section_end(text: bytearray) -> int:
    at_most = min(SECTION + _TO_LINE_END, len(text) - SECTION)
    line_end = text.find(b"\n", SECTION - 1, at_most)
    return line_end + 1 if line_end >= 0 else character_start(text, SECTION)


def cut_in_two(content: bytes, fraction: float) -> tuple[bytes, bytes]:
    """Returns head and tail. The tail has at most `fraction` of the bytes, but at least one character.

    The cut is at the end of a line if one is near. Raises UserError for a text of one character.
    """
    budget = int(fraction * len(content))
    cut = min(max(len(content) - budget, 1), len(content) - 1)
    line_end = content.find(b"\n", cut, cut + budget // 2)
    cut = character_start(content, cut) if line_end < 0 else line_end + 1
    while cut == len(content) or (cut and content[cut] & 0xC0 == 0x80):  # inside the last character
        cut -= 1
    require(cut > 0, "the text is a single character: too short to be split into train and validation.")
    return content[:cut], content[cut:]


def size_of(sizes: Int64[np.ndarray, " D"]) -> SplitSize:
    """Returns the size of a split whose documents have the given bytes."""
    lengths = (int(sizes.min()), int(np.median(sizes)), int(sizes.max())) if len(sizes) else None
    return SplitSize(len(sizes), int(sizes.sum()), lengths)


def notes(copies: int, shared: int, parts: int | None) -> list[str]:
    """Returns notes on a corpus, for the reader.

    Args:
      copies: exact copies that were left out.
      shared: documents of the validation files that were left out of train.
      parts: sections of a corpus of one document, else None.
    """
    found = []
    if copies:
        found.append(f"{copies:,} exact cop{'ies were' if copies > 1 else 'y was'} left out.")
    if shared:
        found.append(f"{shared:,} document(s) of the validation files were left out of train.")
    if parts == 1:
        found.append(f"the corpus is one document shorter than {2 * SECTION // 1024} KiB, cut in two.")
    elif parts is not None:
        found.append(f"the corpus is one document, cut into {parts:,} sections of {SECTION // 1024} KiB.")
    return found
