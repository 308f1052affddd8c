"""Detection of changed files, for caches of file contents."""

import os

from etils import epath


def stamp(path: epath.Path) -> tuple[int, int]:
    """Returns (bytes, time of the last change: in nanoseconds for a local file, in seconds for a remote one)."""
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:  # a remote path, which only epath can read
        remote = path.stat()
        return remote.length, int(remote.mtime)
