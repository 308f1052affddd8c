"""Documents as tokens, with the bytes of the source text that every token stands for.

Losses per token of different tokenizers are not comparable; losses per byte of the same text are. The bytes are counted
in the document itself, from the spans that the tokenizer reports, because spellings in a vocabulary do not tell them:
normalisers drop and change characters, and an unknown token may stand for any text.

- A character's bytes belong to the last token whose span holds it. Where several tokens spell one character, all but
  the last have 0 bytes.
- A character that is in no span (stripped, or dropped as space between words) belongs with the character before it, at
  the start of the document with the first one that is in a span.

So the bytes of a document's tokens sum exactly to its length, and those of its pieces do, however it is cut. A document
without tokens has no place for its bytes; nothing of it is predicted, and it counts nowhere. The first token of a
document is no target: bits per byte are the bits of the targets over the bytes of the targets.
"""

import codecs
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from engrax.data.config import TokenArray

_INVALID = 0xDC00  # plus the number of bytes: stands for bytes that are not UTF-8 (a surrogate: UTF-8 has none)
_REPLACEMENT = 0xFFFD
PART = 1 << 20  # bytes of a document that are encoded at once
_WIDER = (0x80, 0x800, 0x10000)  # from each of these code points on, UTF-8 takes one byte more


@runtime_checkable
class Document(Protocol):
    """A document as tokens: `Encoded`, or one on disk, which is read where `tokens` and `bytes` are sliced."""

    tokens: Any
    bytes: Any

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The tokens of a document and the bytes of source text that each stands for, in any integer types."""

    tokens: TokenArray
    bytes: TokenArray  # as many; they sum to the document's length in bytes, if it has tokens

    def __len__(self) -> int:
        return len(self.tokens)


def encode_in_parts(tokenizer: Any, chunks: Iterable[bytes]) -> Iterator[Encoded]:
    """Encodes a document, given in chunks, with a tokenizer of `engrax.data.tokenizers`.

    A document longer than PART bytes is encoded in parts, which end with a line if one ends in the last sixteenth, else
    with a character: memory does not grow with it.
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
    """Returns the document of its parts."""
    return Encoded(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("tokens", "bytes")))


def character_start(text: bytes | bytearray, at: int) -> int:
    """Returns the first place from `at` on where a character of UTF-8 starts, at most 3 bytes on."""
    for place in range(at, min(at + 3, len(text))):
        if text[place] & 0xC0 != 0x80:
            return place
    return min(at + 3, len(text))


def readable(text: str | bytes) -> tuple[str, Int[np.ndarray, "C"]]:
    """Returns (the text, the source bytes of each of its characters).

    Bytes are read as UTF-8. Those that are not UTF-8 become U+FFFD, as with `errors="replace"`, and keep their number.
    Raises UnicodeEncodeError for a string with lone surrogates, which has no bytes.
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
    """The last token whose span holds each character, -1 without one; spans may overlap and come in any order.

    A span is covered by two blocks of a power of two characters, and a block by its halves, longest first: the time
    grows with tokens and characters, however the spans overlap.
    """
    starts, ends = np.clip(spans, 0, count).T
    lengths = ends - starts
    last = np.full(count, -1)  # entry i: of the block that starts at i
    for power in reversed(range(int(lengths.max(initial=0)).bit_length())):
        block = 1 << power
        longer = last.copy()
        np.maximum(last[block:], longer[:-block], out=last[block:])
        chosen = np.flatnonzero(lengths >> power == 1)
        np.maximum.at(last, starts[chosen], chosen)
        np.maximum.at(last, ends[chosen] - block, chosen)
    return last
