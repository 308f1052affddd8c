"""Whether a tokenizer reproduces its texts. A model never sees text that its tokenizer drops or changes."""

from collections.abc import Iterable

from engrax.data.encoded import readable
from engrax.data.tokenizers import Tokenizer

FIRST_DOCUMENTS = 16  # documents tried in each split
FIRST_CHARACTERS = 4_096  # characters tried in each document
_SHOWN = 12  # characters before and after the first change


def first_change(tokenizer: Tokenizer, texts: Iterable[str | bytes]) -> tuple[str, str] | None:
    """The first place where a decoded text differs, as (text, decoded text); None if all are reproduced.

    Bytes that are not UTF-8 count as U+FFFD, which the tokenizer gets.
    """
    for document in texts:
        text = readable(document[: 4 * FIRST_CHARACTERS])[0][:FIRST_CHARACTERS]
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            pairs = zip(text, back)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
            return text[max(at - _SHOWN, 0) : at + _SHOWN], back[max(at - _SHOWN, 0) : at + _SHOWN]
    return None
