"""Files that others may have written: their content is checked, and their names never lead outside their folder."""

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from engrax.errors import UserError

MOST_JSON = 1 << 28  # most bytes of a JSON file; the largest tokenizers have a tenth of it


def cache_folder() -> Path:
    """The folder of everything that can be computed again: `$ENGRAX_CACHE`, or `~/.cache/engrax`."""
    if base := os.environ.get("ENGRAX_CACHE"):
        return Path(base).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "engrax"


def read_json(path: Any, remedy: str = "restore the file") -> dict[str, Any]:
    """The object in a JSON file (a pathlib or epath path).

    Raises UserError if the file is missing, not a regular file, too large, or not a JSON object.
    """
    return parse_object(read_text(path, remedy), str(path), remedy)


def read_text(path: Any, remedy: str = "restore the file") -> str:
    """The text of a UTF-8 file. Raises UserError if it is missing, not a regular file, too large or not UTF-8."""
    if not path.exists():
        raise UserError(f"{path} is missing; {remedy}.")
    if not path.is_file():  # a read of a pipe, for example, might never end
        raise UserError(f"{path} is no file; {remedy}.")
    if "://" not in str(path) and os.path.getsize(path) > MOST_JSON:
        raise UserError(f"{path} has more than {MOST_JSON >> 20} MiB; {remedy}.")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged (not UTF-8: {error}); {remedy}.") from None


def parse_object(text: str, where: str, remedy: str = "restore the file") -> dict[str, Any]:
    """The JSON object in a text. Raises UserError for anything else; `where` names the file in it."""
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
    """The value, if it has this type; an int counts as a float, a bool is not a number. Raises UserError otherwise."""
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is float and not _is_finite(value)):
        raise UserError(f"{where} is {short(value)}, not {WORDS[kind]}; restore the file.")
    return value


def _is_finite(value: int | float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int larger than every float
        return False


def expect_texts(value: Any, where: str) -> dict[str, str]:
    """The value, if it is an object with text values. Raises UserError otherwise."""
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
    """The name, if it is a plain file name. Raises UserError if it leads out of its folder."""
    plain = isinstance(name, str) and name not in ("", ".", "..") and len(name.encode(errors="replace")) < 256
    if not plain or any(c in "/\\:" or not c.isprintable() for c in name):
        raise UserError(
            f"{where} names the file {short(name)}; only plain names of files in its own folder are allowed."
        )
    return name


def refuse_links(folder: Any) -> None:
    """Raises UserError if a run folder holds anything but files and folders, at any depth: a link would lead out of it,
    a pipe would never end. Folders named wandb are skipped: wandb links its newest log, and engrax never opens them.
    Buckets have no links."""
    if "://" in str(folder) or not os.path.isdir(folder):
        return
    waiting = [str(folder)]
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except FileNotFoundError:  # a training beside this process removes old checkpoints
            continue
        with entries:
            for entry in entries:
                try:
                    mode = entry.stat(follow_symlinks=False).st_mode
                except FileNotFoundError:
                    continue
                if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                    what = "symbolic link" if stat.S_ISLNK(mode) else "special file"
                    raise UserError(f"{entry.path} is a {what}, which engrax does not follow; put a copy in its place.")
                if stat.S_ISDIR(mode) and entry.name != "wandb":
                    waiting.append(entry.path)


def write_atomically(path: Any, text: str) -> None:
    """Writes a temporary file, then renames it. After a crash there is the old file or the new one.

    Anything at the temporary file's path, for example a link, is removed and not written through.
    """
    temporary = path.parent / (path.name + ".tmp")
    if "://" not in str(path):
        temporary.unlink(missing_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
    else:
        temporary.write_text(text)
    temporary.replace(path)


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is the error or among its causes. Libraries may pass on its text alone."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
            return True
        error = error.__cause__ or error.__context__
    return False
