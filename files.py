"""Files that others may have written: what they say is checked, and what they name never leads outside their folder."""

import json
import math
import os
import stat
from typing import Any

from engrax.errors import UserError

MOST_JSON = 1 << 28  # bytes of a JSON file that is read; the largest tokenizers have a tenth of it


def read_json(path: Any, remedy: str = "restore the file") -> dict[str, Any]:
    """The object in a JSON file (a pathlib or epath path).

    Raises UserError where the file is missing, no regular file, too large, or holds anything but a JSON object.
    """
    return parse_object(read_text(path, remedy), str(path), remedy)


def read_text(path: Any, remedy: str = "restore the file") -> str:
    """The text of a UTF-8 file. Raises UserError where it is missing, no regular file, too large or not UTF-8."""
    if not path.exists():
        raise UserError(f"{path} is missing; {remedy}.")
    if not path.is_file():  # of a pipe, say, nothing would ever be read
        raise UserError(f"{path} is no file; {remedy}.")
    if "://" not in str(path) and os.path.getsize(path) > MOST_JSON:
        raise UserError(f"{path} has more than {MOST_JSON >> 20} MiB; {remedy}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged (not UTF-8: {error}); {remedy}.") from None


def parse_object(text: str, where: str, remedy: str = "restore the file") -> dict[str, Any]:
    """The JSON object in a text; `where` names its file in the UserError that anything else raises."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, or a thousand brackets
        raise UserError(f"{where} is damaged (not JSON: {error}); {remedy}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{where} is damaged (it holds no JSON object); {remedy}.")
    return found


WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
}


def expect(value: Any, kind: type, where: str) -> Any:
    """The value, where it is of the kind; an int is a float too, a bool is no number. Raises UserError otherwise."""
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not _is_finite(value)):
        raise UserError(f"{where} is {short(value)}, not {WORDS[kind]}; restore the file.")
    return value


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond all floats
        return False


def expect_texts(value: Any, where: str) -> dict[str, str]:
    """The value, where it is an object of texts. Raises UserError otherwise."""
    for name, text in expect(value, dict, where).items():
        expect(text, str, f"{where}.{name}")
    return value


def short(value: Any) -> str:
    """The value's repr, cut to one short piece of a line."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an int of more than 4,300 digits
        text = type(value).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain_name(name: Any, where: str) -> str:
    """The name, where it is that of a file in one folder. Raises UserError where it leads anywhere else."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and len(name.encode(errors="replace")) < 256
    if not plain or any(c in "/\\:" or not c.isprintable() for c in name):
        raise UserError(
            f"{where} names the file {short(name)}; only plain names of files in its own folder are allowed."
        )
    return name


def refuse_links(folder: Any) -> None:
    """Raises UserError where a run folder holds anything but files and folders, at any depth: a link would lead out of
    it, a pipe would never end. What lies in folders named wandb, which links its newest log, engrax never opens; and
    buckets have no links."""
    if "://" in str(folder) or not os.path.isdir(folder):
        return
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                mode = entry.stat(follow_symlinks=False).st_mode
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    what = "symbolic link" if stat.S_ISLNK(mode) else "special file"
                    raise UserError(f"{entry.path} is a {what}, which engrax does not follow; put a copy in its place.")
                if stat.S_ISDIR(mode) and entry.name != "wandb":
                    waiting.append(entry.path)


def write_atomically(path: Any, text: str) -> None:
    """Writes a temporary file, then renames it: after a crash there is the old file or the new one.

    What stands in the temporary file's place, a link say, is removed and not written through.
    """
    temporary = path.parent / (path.name + ".tmp")
    if "://" not in str(path):
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
    else:
        temporary.write_text(text)
    temporary.replace(path)
