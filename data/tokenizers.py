"""Tokenizers: bytes, or a local Hugging Face `tokenizer.json`. Ids are int32; no special tokens are added.

Both return the tokens of a text and the source bytes of each (`engrax.data.encoded` has the rule).
"""

import functools
import hashlib
import itertools
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, Int32

from engrax.data.encoded import Encoded, bytes_of_spans, readable
from engrax.data.files import stamp
from engrax.data.token_types import TokenTypes, byte_types
from engrax.errors import UserError

ENDS_OF_TEXT = frozenset(
    [
        "<|endoftext|>",
        "</s>",
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<eos>",
        "[EOS]",
        "<end_of_turn>",
    ]
)


class ByteTokenizer:
    """Every byte is a token. The vocabulary is 256; text in any encoding can be represented."""

    vocab_size = 256
    manifest = "bytes"
    end_of_text: tuple[int, ...] = ()  # tokens that end a text

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        """Returns the bytes of the text (UTF-8 of a string). Raises UserError for a string without a UTF-8 form."""
        data = _utf8(text) if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def decode(self, ids) -> str:
        """Returns the text; bytes that are not UTF-8 become U+FFFD. Raises ValueError for ids outside [0, 256)."""
        return bytes(np.asarray(ids, np.int64).ravel().tolist()).decode("utf-8", errors="replace")

    def encode_with_bytes(self, text: str | bytes) -> Encoded:
        """Returns the bytes of the text as tokens; each has one source byte (one element in memory for all)."""
        tokens = self.encode(text)
        return Encoded(tokens, np.broadcast_to(np.uint8(1), tokens.shape))

    def token_types(self, tokens: Int[np.ndarray, "N T"]) -> TokenTypes:
        """Letters, digits, space, newlines, brackets, quotes, operators, other punctuation, other bytes."""
        return byte_types(tokens)


class JsonTokenizer:
    """A Hugging Face tokenizer, read from a `tokenizer.json` file without network."""

    def __init__(self, path: str):
        """Reads the file (a local path or one that etils.epath opens); raises UserError if it is damaged."""
        import tokenizers

        content = epath.Path(path).read_bytes()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises a bare Exception
            reason = " ".join(str(error).split())
            raise UserError(f"tokenizer file {path} is not a readable tokenizer.json ({reason}).") from error
        if not self._tokenizer.get_vocab_size():
            raise UserError(f"tokenizer file {path} holds no token; restore the file.")
        # The file may enable truncation or padding of every text; packing needs neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The post-processor adds special tokens, and some trim the space off a token's span, where it belongs.
        self._tokenizer.post_processor = None
        self.manifest = hashlib.sha256(content).hexdigest()

    @property
    def end_of_text(self) -> tuple[int, ...]:
        """Ids of the added special tokens that end a text, by their names in published tokenizers."""
        added = self._tokenizer.get_added_tokens_decoder().items()
        return tuple(sorted(index for index, token in added if token.special and token.content in ENDS_OF_TEXT))

    @property
    def vocab_size(self) -> int:
        """Size of an embedding table that holds every id, gaps in the ids included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        """Returns the ids; bytes are decoded as UTF-8, invalid ones become U+FFFD.

        Raises UserError for a string without a UTF-8 form, and for a text that the tokenizer has no ids for.
        """
        data = _utf8(text) if isinstance(text, str) else text
        return np.asarray(self._encoding(data.decode("utf-8", errors="replace")).ids, np.int32)

    def _encoding(self, text: str) -> Any:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises a bare Exception, as for an unknown token
            raise UserError(f"the tokenizer cannot read a text ({error}); restore its tokenizer.json.") from error

    def encode_with_bytes(self, text: str | bytes) -> Encoded:
        """Returns the ids of `encode`, and the bytes of each in the smallest integer type.

        Their sum is the bytes of the text, unless it has no ids.
        """
        text, sizes = readable(text)
        found = self._encoding(text)
        spans = np.fromiter(itertools.chain.from_iterable(found.offsets), np.int64, 2 * len(found)).reshape(-1, 2)
        counted = bytes_of_spans(spans, sizes)
        return Encoded(np.asarray(found.ids, np.int32), counted.astype(np.min_scalar_type(counted.max(initial=0))))

    def name_of(self, index: int) -> str | None:
        """The token of an id, as the file spells it."""
        return self._tokenizer.id_to_token(index)

    def to_json(self) -> str:
        """The text of a tokenizer.json that adds no special tokens, as this tokenizer does."""
        return self._tokenizer.to_str()

    def decode(self, ids) -> str:
        """Returns the text."""
        return self._tokenizer.decode(np.asarray(ids, np.int64).ravel().tolist(), skip_special_tokens=False)


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        where = f"character {error.start + 1}"
        raise UserError(f"the text is no UTF-8 ({where} is half of one, a surrogate); give it in UTF-8.") from None


Tokenizer = ByteTokenizer | JsonTokenizer
_BYTES = ByteTokenizer()


def load_tokenizer(tokenizer_file: str | None) -> Tokenizer:
    """Returns the byte tokenizer for None, else the tokenizer of the file; raises UserError for a bad file."""
    if tokenizer_file is None:
        return _BYTES
    file = epath.Path(tokenizer_file)
    if not file.is_file():
        raise UserError(f"tokenizer file {tokenizer_file} does not exist.")
    return _load_json(tokenizer_file, stamp(file))


@functools.lru_cache(maxsize=4)
def _load_json(path: str, changed: tuple[int, int]) -> JsonTokenizer:
    """Size and time of change are part of the cache key, so a changed file is read again."""
    return JsonTokenizer(path)
