"""What surrounds a needle: a repeated paragraph, any local text, and made-up words. Nothing is downloaded."""

import functools
import hashlib
import re

from etils import epath

from engrax.data.config import require
from engrax.data.draws import Draws
from engrax.data.files import Listed, list_files
from engrax.data.sources import Reader
from engrax.errors import UserError

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SUFFIXES = (".txt", ".md", ".rst")  # also compressed
MOST_BYTES = 8_000_000  # of a text folder that are read

_END = re.compile(r"(?<=[.!?])(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\be\.g\.)(?<!\bi\.e\.) ")
_ONSETS = "b bl br c cl cr d dr f fl fr g gl gr h j k l m n p pl pr qu r s sh sl sp st t th tr v w z".split()
_VOWELS = "a e i o u ai ea ee oa oo ou".split()
_CODAS = ["", "", "ck", "l", "m", "n", "nd", "r", "rn", "s", "st", "t"]


class Text:
    """A long text as words with single spaces between; it begins again at its end."""

    def __init__(self, words: list[str], manifest: str):
        self.words, self.manifest = words, manifest

    def piece(self, start: int, count: int) -> str:
        """`count` words from word `start` on."""
        start %= len(self.words)
        found = self.words[start : start + count]
        while len(found) < count:
            found += self.words[: count - len(found)]
        return " ".join(found)

    @functools.cached_property
    def sentences(self) -> list[str]:
        """The sentences of the text."""
        return sentences(" ".join(self.words))


def sentences(text: str) -> list[str]:
    """The sentences of a text: each ends with a point, a question or an exclamation mark before a space, and the point
    is not that of a few usual abbreviations."""
    return _END.split(text) if text else []


def load_text(path: str | None) -> Text:
    """The text of a file or of a folder's text files, in the order of their names; None = Python's own documentation.

    Raises UserError if the path is missing or holds no text.
    """
    return _python_text() if path is None else _folder_text(path)


@functools.lru_cache(maxsize=1)
def _python_text() -> Text:
    """The language reference that every Python brings for `help()`; it differs between versions."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python keeps no documentation of its own; set haystack_path to a text folder.") from None
    return _text([topics[name].encode() for name in sorted(topics)])


def _folder_text(path: str) -> Text:
    root = epath.Path(path)
    require(root.exists(), f"text folder {path} does not exist.")
    found = _read(list_files(root, SUFFIXES).files)
    require(bool(found.words), f"text folder {path} holds no text (files ending in {', '.join(SUFFIXES)}).")
    return found


@functools.lru_cache(maxsize=4)
def _read(files: tuple[Listed, ...]) -> Text:
    """Reads files. Size and time of change are part of the cache key, so a changed file is read again."""
    reader, contents, left = Reader("text", None), [], MOST_BYTES
    for file in files:
        for chunks in reader.documents(file.path) if left > 0 and file.stamp[0] else ():
            contents.append(b"".join(chunks)[:left])
            left -= len(contents[-1])
    return _text(contents)


def _text(contents: list[bytes]) -> Text:
    joined = b"\n".join(contents)
    return Text(joined.decode("utf-8", errors="ignore").split(), hashlib.sha256(joined).hexdigest())


def load_words(path: str | None, least: int) -> tuple[str, ...]:
    """Distinct words, one in each line of a file; None = made-up words. Raises UserError if there are fewer than
    `least`."""
    if path is None:
        return made_words(max(least, 2048))
    file = epath.Path(path)
    require(file.is_file(), f"word list {path} does not exist.")
    found = tuple(dict.fromkeys(file.read_text(encoding="utf-8").split()))
    require(len(found) >= least, f"word list {path} has {len(found)} words, and the task needs {least}.")
    return found


@functools.lru_cache(maxsize=8)
def made_words(count: int) -> tuple[str, ...]:
    """The first `count` of a fixed series of distinct words of two or three syllables."""
    draws, found = Draws(0x7E7, 1), {}
    while len(found) < count:
        syllables = 2 + draws.below(2)
        word = "".join(draws.choice(_ONSETS) + draws.choice(_VOWELS) for _ in range(syllables)) + draws.choice(_CODAS)
        found[word] = None
    return tuple(found)
