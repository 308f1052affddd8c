"""What tells that a file has changed, for the caches of what was read from it."""

import os

from etils import epath


def stamp(path: epath.Path) -> tuple[int, int]:
    """Returns (bytes, time of the last change: nanoseconds of a local file, seconds of a remote one)."""
    try:
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    except OSError:  # a remote path, which only epath can read
        remote = path.stat()
        return remote.length, int(remote.mtime)
