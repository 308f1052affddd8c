"""Documents as tokens, with the number of source bytes of every token.

Losses per token are not comparable between tokenizers; losses per byte of the same text are. The bytes are counted in
the document itself, from the spans that the tokenizer reports. The vocabulary's spellings do not give them: normalisers
drop and change characters, and an unknown token may stand for any text.

- A character's bytes belong to the last token whose span contains it. If several tokens spell one character, all but
  the last have 0 bytes.
- A character may be in no span (stripped, or dropped as space between words). Its bytes go with the character before
  it; at the start of the document, with the first character in a span.

So the bytes of a document's tokens sum exactly to its length, and the same holds for its pieces, for any cut. A
document without tokens has no predicted tokens and does not count. The first token of a document is not a target: bits
per byte are the bits of the targets over the bytes of the targets.
"""

import codecs
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from engrax.data.config import TokenArray

_INVALID = 0xDC00  # plus the number of bytes: marks bytes that are not UTF-8 (a surrogate, which UTF-8 does not have)
_REPLACEMENT = 0xFFFD
PART = 1 << 20  # bytes of a document that are encoded at once
_WIDER = (0x80, 0x800, 0x10000)  # from each of these code points on, UTF-8 takes one more byte


@runtime_checkable
class Document(Protocol):
    """A document as tokens: `Encoded`, or one on disk, which is read when `tokens` and `bytes` are sliced."""

    tokens: Any
    bytes: Any

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of a document and the source bytes of each, in any integer types."""

    tokens: TokenArray
    bytes: TokenArray  # one per token; the sum is the document's length in bytes, if it has tokens

    def __len__(self) -> int:
        return len(self.tokens)


def encode_in_parts(tokenizer: Any, chunks: Iterable[bytes]) -> Iterator[Encoded]:
    """Encodes a document, given in chunks, with a tokenizer of `engrax.data.tokenizers`.

    A document longer than PART bytes is encoded in parts, so memory does not grow with its length. A part ends with a
    line if one ends in the last sixteenth, else with a character.
    """
    rest = bytearray()
    for chunk in chunks:
        rest += chunk
        while len(rest) > PART:
            line_end = rest.rfind(b"\n", PART - PART // 16, PART)
            cut = line_end + 1 if line_end >= 0 else character_start(rest, PART - 3)
            yield tokenizer.encode_with_bytes(bytes(rest[:cut]))
            del rest[:cut]
    if rest:
        yield tokenizer.encode_with_bytes(bytes(rest))


def joined(parts: Sequence[Encoded]) -> Encoded:
    """Joins the parts of a document."""
    return Encoded(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "bytes")))


def character_start(text: bytes | bytearray, at: int) -> int:
    """Returns the first position from `at` on where a UTF-8 character starts, at most 3 bytes later."""
    for place in range(at, min(at + 3, len(text))):
        if text[place] & 0xC0 != 0x80:
            return place
    return min(at + 3, len(text))


def readable(text: str | bytes) -> tuple[str, Int[np.ndarray, "C"]]:
    """Returns (the text, the source bytes of each of its characters).

    Bytes are read as UTF-8. Invalid bytes become U+FFFD, as with `errors="replace"`, and their number is kept. Raises
    UnicodeEncodeError for a string with lone surrogates, which has no UTF-8 form.
    """
    given = text.decode("utf-8", errors="engrax_sized") if isinstance(text, bytes) else text
    codes = np.frombuffer(given.encode("utf-32-le", "surrogatepass" if isinstance(text, bytes) else "strict"), "<u4")
    sizes = np.ones(len(codes), np.int8)
    for first in _WIDER:
        sizes += codes >= first
    invalid = codes & ~np.uint32(3) == _INVALID
    if invalid.any():
        sizes[invalid] = codes[invalid] - _INVALID
        given = np.where(invalid, np.uint32(_REPLACEMENT), codes).tobytes().decode("utf-32-le")
    return given, sizes


def _sized(error: UnicodeDecodeError) -> tuple[str, int]:
    return chr(_INVALID + error.end - error.start), error.end


codecs.register_error("engrax_sized", _sized)


def bytes_of_spans(spans: Int[np.ndarray, "T 2"], sizes: Int[np.ndarray, "C"]) -> Int[np.ndarray, "T"]:
    """The bytes of every token, from its span of characters [start, end) and the bytes of the characters."""
    if not len(spans) or not len(sizes):
        return np.zeros(len(spans), np.int64)
    last = _last_holders(spans, len(sizes))
    held = np.flatnonzero(last >= 0)
    first = held[0] if len(held) else 0
    before = np.maximum.accumulate(np.where(last >= 0, np.arange(len(last)), first))
    owner = last[before] if len(held) else np.full(len(last), len(spans) - 1)
    return np.bincount(owner, weights=sizes, minlength=len(spans)).astype(np.int64)


def _last_holders(spans: Int[np.ndarray, "T 2"], count: int) -> Int[np.ndarray, "C"]:
    """The last token whose span contains each character, -1 = none. Spans may overlap and come in any order.

    Two blocks of a power of two characters cover a span, and two halves cover a block, longest first. The time is
    linear in tokens and characters, for any overlap of the spans.
    """
    starts, ends = np.clip(spans, 0, count).T
    lengths = ends - starts
    last = np.full(count, -1)  # entry i: for the block that starts at i
    for power in reversed(range(int(lengths.max(initial=0)).bit_length())):
        block = 1 << power
        longer = last.copy()
        np.maximum(last[block:], longer[:-block], out=last[block:])
        chosen = np.flatnonzero(lengths >> power == 1)
        np.maximum.at(last, starts[chosen], chosen)
        np.maximum.at(last, ends[chosen] - block, chosen)
    return last
