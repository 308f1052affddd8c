"""A tokenizer as the files that transformers loads."""

import json
from typing import Any

from engrax.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer

CLASS = "PreTrainedTokenizerFast"  # said, or transformers would choose one by the model's type, with rules of its own
NEVER = int(1e30)  # transformers' word for a length without limit


def describe(tokenizer: Tokenizer, longest: int | None) -> tuple[dict[str, str], dict[str, int | None]]:
    """({file: text}, {bos_token_id, eos_token_id, pad_token_id}); longest: most tokens of a text, None = any number.

    Nothing is added to a text, as in training: there is no beginning token. The first token that ends a text is also
    the padding.
    """
    end = next(iter(tokenizer.end_of_text), None)
    name = None if end is None else tokenizer.name_of(end)
    config: dict[str, Any] = {
        "tokenizer_class": CLASS,
        "bos_token": None,
        "eos_token": name,
        "pad_token": name,
        "unk_token": None,
        "padding_side": "left",
        "model_max_length": NEVER if longest is None else longest,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": to_json(tokenizer), "tokenizer_config.json": json.dumps(config, indent=2) + "\n"}
    return files, {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}


def to_json(tokenizer: Tokenizer) -> str:
    """The text of a tokenizer.json that gives the same ids."""
    return tokenizer.to_json() if isinstance(tokenizer, JsonTokenizer) else _bytes_to_json(tokenizer)


def _bytes_to_json(tokenizer: ByteTokenizer) -> str:
    """Byte-level BPE without merges. Its vocabulary has a printable character for each byte: the byte's own if it has
    one, else the next from U+0100 on."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers

    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    made = Library(models.BPE(vocab={character: byte for byte, character in characters.items()}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made.to_str(pretty=True)
