"""Digests of a checkpoint's files: whether a folder still holds what was written.

A sealed folder holds `digests.json`: the size and the 128-bit XXH3 of every other file in it, at any depth. XXH3 finds
accidents (a flipped bit, a truncated or missing file), not a forger. XXH3 is read at memory speed: reading the files
takes the time.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import xxhash
from etils import epath
from jax.experimental import multihost_utils

from engrax.errors import UserError
from engrax.files import parse_object, read_text

NAME = "digests.json"
DUE = {"engrax_digests": True}  # Orbax's own metadata of a checkpoint say with this that digests belong to it
ORBAX_METADATA = "_CHECKPOINT_METADATA"
WRITTEN_LAST = (
    ORBAX_METADATA,
    "commit_success.txt",
)  # where Orbax completes a save by a file (a bucket), after sealing
_CHUNK = 1 << 20  # bytes read at once
_THREADS = min(8, os.cpu_count() or 1)


def seal(folder: epath.Path, *, without: Iterable[str] = ()) -> None:
    """Writes the digests of all files in a folder, except those `without`."""
    names = [name for name in _names(folder) if name != NAME and name not in without]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(lambda name: _digest(folder / name), names)
        text = _render(dict(zip(names, found)))
    (folder / NAME).write_text(text)


def is_sealed(folder: epath.Path) -> bool:
    """Whether digests belong to a checkpoint, present or lost; False for those saved by engrax before it had them."""
    if (folder / NAME).exists():
        return True
    try:
        found = json.loads((folder / ORBAX_METADATA).read_text())
        return DUE.items() <= found["custom_metadata"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def unsound(folder: epath.Path, only: str = "", *, alone: bool = False) -> str | None:
    """What is wrong with a sealed folder, beginning with the file's name; None if all is well, or if it is not sealed.

    `only`: a part of the folder, whose files alone are read. Several processes share the reading and return the same,
    so all must call it, unless one does it `alone`.
    """
    if not is_sealed(folder):
        return None
    try:
        wanted = _parse(folder)
    except UserError:
        return f"{NAME} is missing or no list of digests"
    present = set(_names(folder)) - {NAME}
    if missing := sorted(wanted.keys() - present):
        return f"{missing[0]} is missing"
    if extra := sorted(present - wanted.keys() - set(WRITTEN_LAST)):
        return f"{extra[0]} does not belong to it"
    names = sorted(name for name in wanted if name.startswith(only))
    index, count = (0, 1) if alone else (jax.process_index(), jax.process_count())
    mine = range(index, len(names), count)
    with ThreadPoolExecutor(_THREADS) as pool:
        bad = [i for i, reason in zip(mine, pool.map(lambda i: _differs(folder, names[i], wanted), mine)) if reason]
    first = min(bad, default=len(names))
    if count > 1:
        first = int(np.min(multihost_utils.process_allgather(np.asarray(first))))
    return None if first == len(names) else _differs(folder, names[first], wanted) or f"{names[first]} was misread"


def _differs(folder: epath.Path, name: str, wanted: dict[str, list]) -> str | None:
    """What is wrong with one file."""
    try:
        found = _digest(folder / name)
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if found[0] != wanted[name][0]:
        return f"{name} has {found[0]:,} bytes instead of {wanted[name][0]:,}"
    return None if found == wanted[name] else f"{name} differs from its digest"


def _digest(path: epath.Path) -> list[Any]:
    """[bytes, digest in hexadecimal] of a file."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return [size, digest.hexdigest()]


def _names(folder: epath.Path) -> Iterator[str]:
    """The files in a folder, at any depth, as relative paths with slashes."""
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from (f"{entry.name}/{name}" for name in _names(entry))
        else:
            yield entry.name


def _render(digests: dict[str, list]) -> str:
    lines = (f"{json.dumps(name)}: {json.dumps(digests[name])}" for name in sorted(digests))
    body = ",\n".join(lines)
    own = xxhash.xxh3_128_hexdigest(body.encode())
    return f'{{"algorithm": "xxh3_128", "own": "{own}", "files": {{\n{body}\n}}}}\n'


def _parse(folder: epath.Path) -> dict[str, list]:
    """The digests that `seal` wrote. Raises UserError unless the file has exactly that text."""
    text = read_text(folder / NAME)
    try:
        files = parse_object(text, NAME)["files"]
        if all(type(size) is int for size, _ in files.values()) and _render(files) == text:
            return files
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise UserError(f"{folder / NAME} is damaged.")
