"""Whether a tokenizer gives back the texts it is given. What it drops or changes, a model of its tokens never sees."""

from collections.abc import Iterable

from engrax.data.encoded import readable
from engrax.data.tokenizers import Tokenizer

FIRST_DOCUMENTS = 16  # of each split are tried
FIRST_CHARACTERS = 4_096  # of each document
_SHOWN = 12  # characters before and after the first change


def first_change(tokenizer: Tokenizer, texts: Iterable[str | bytes]) -> tuple[str, str] | None:
    """The first place where a decoded text differs, as (text, what comes back); None where all come back.

    Bytes that are not UTF-8 count as the U+FFFD that the tokenizer gets.
    """
    for document in texts:
        text = readable(document[: 4 * FIRST_CHARACTERS])[0][:FIRST_CHARACTERS]
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text:
            pairs = zip(text, back)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(back)))
            return text[max(at - _SHOWN, 0) : at + _SHOWN], back[max(at - _SHOWN, 0) : at + _SHOWN]
    return None
