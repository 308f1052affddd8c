"""Files of a folder, and detection of changed files for caches of their contents."""

import collections
import hashlib
import os
import stat
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from engrax.errors import UserError

RUN = {"config.json", "metrics.jsonl"}  # a folder inside a corpus that holds these is a run, not text
PACKED = (".gz", ".bz2", ".zst")  # endings of compressed files, ignored by `list_files`


class Listed(NamedTuple):
    """A file that was found."""

    name: str  # path in the folder, with "/"
    path: str
    stamp: tuple[int, int]  # (bytes, time of the last change)


class Listing(NamedTuple):
    """The files of a folder, sorted by name, and the endings of those that were left out."""

    files: tuple[Listed, ...]
    others: tuple[tuple[str, int], ...]  # (ending, files), most first


def stamp(path: epath.Path) -> tuple[int, int]:
    """Returns (bytes, time of the last change: in nanoseconds for a local file, in seconds for a remote one)."""
    try:
        return _local_stamp(os.stat(path))
    except OSError:  # a remote path, which only epath can read
        remote = path.stat()
        return remote.length, int(remote.mtime)


def _local_stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def open_bytes(path: str) -> Any:
    """Opens a file for reading. A local file is opened without epath, which takes as long as reading it."""
    return epath.Path(path).open("rb") if "://" in path else open(path, "rb")


def manifest_of(files: tuple[Listed, ...], given: tuple[Listed, ...] | None, reader: Any) -> str:
    """Returns the SHA-256 of path, size and SHA-256 of every file, also of a given validation split, and of the
    reader's settings (the text of `reader`)."""
    manifest = hashlib.sha256()
    for file in files + (given or ()):
        with open_bytes(file.path) as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        manifest.update(f"{file.name}\t{file.stamp[0]}\t{digest}\n".encode(errors="surrogateescape"))
    manifest.update(f"{reader}\t{None if given is None else len(given)}".encode())
    return manifest.hexdigest()


def list_files(root: epath.Path, suffixes: tuple[str, ...]) -> Listing:
    """Returns the files below a folder whose names end in one of `suffixes` (() = all), compressed or not.

    Hidden files and folders are left out, and so are run folders. Links are followed; a folder is read once, so a loop
    of links ends. A single file may have any ending. Raises UserError for anything that is not a file: a dangling link,
    a pipe, a device.
    """
    if not root.is_dir():
        return Listing((Listed(root.name, str(root), _checked_stamp(root)),), ())
    walk = _walk_remote if "://" in str(root) else _walk
    found, others = [], collections.Counter()
    for name, path, look in walk(root):
        plain = name.lower()
        for ending in PACKED:
            plain = plain.removesuffix(ending)
        if not suffixes or plain.endswith(tuple(suffix.lower() for suffix in suffixes)):
            found.append(Listed(name, path, look()))
        else:
            others[os.path.splitext(plain)[1] or "none"] += 1
    return Listing(tuple(sorted(found)), tuple(sorted(others.items(), key=lambda other: (-other[1], other[0]))))


def _walk(root: epath.Path) -> Iterator[tuple]:
    """Yields (name, path, function that returns the stamp) of every file of a local folder."""
    folders, seen = [("", str(root))], set()
    while folders:
        prefix, folder = folders.pop()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name, reverse=True)
        for entry in _text_entries(entries, prefix):
            if os.path.isdir(entry.path):  # as entry.is_dir(), but False for a link to itself
                folders.append((f"{prefix}{entry.name}/", entry.path))
            else:
                yield prefix + entry.name, entry.path, lambda entry=entry: _checked_stamp(entry)


def _text_entries(entries: list[Any], prefix: str) -> list[Any]:
    """The entries of a folder that are not hidden; none of a run folder inside the corpus."""
    if prefix and {entry.name for entry in entries} >= RUN:
        return []
    return [entry for entry in entries if not entry.name.startswith(".")]


def _checked_stamp(entry: "os.DirEntry | epath.Path") -> tuple[int, int]:
    """Returns the stamp of a file; raises UserError if it is not a file."""
    if isinstance(entry, epath.Path) and "://" in str(entry):
        return stamp(entry)
    try:
        status = os.stat(entry)
    except OSError as error:
        raise UserError(f"{os.fspath(entry)} cannot be read ({error.strerror}); remove it, or mend the link.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{os.fspath(entry)} is neither a file nor a folder (a pipe or a device); remove it.")
    return _local_stamp(status)


def _walk_remote(root: epath.Path) -> Iterator[tuple]:
    folders = [("", root)]
    while folders:
        prefix, folder = folders.pop()
        for entry in _text_entries(list(folder.iterdir()), prefix):
            if entry.is_dir():
                folders.append((f"{prefix}{entry.name}/", entry))
            else:
                yield prefix + entry.name, str(entry), lambda entry=entry: stamp(entry)
