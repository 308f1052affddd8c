"""One process writes a run folder at a time. Meanwhile a file has its host, its process number and its start."""

import contextlib
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engrax import files
from engrax.errors import UserError

NAME = "lock.json"


@contextlib.contextmanager
def held(directory: Any) -> Iterator[None]:
    """Holds the lock of a run folder. It takes over the lock of an ended process of this host, and of an earlier start
    of the same cluster job on another host: a scheduler runs a job once at a time.

    A missing folder is created, and removed again if nothing was written. Raises UserError if another process holds the
    lock.
    """
    path = directory / NAME
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    mine = {"host": socket.gethostname(), "process": os.getpid(), "started": _started(os.getpid()), "job": _job()}
    if "://" in str(path):  # a bucket cannot create a file exclusively: only this check is possible
        refuse_other(directory)
        path.write_text(json.dumps(mine))
    else:
        directory.mkdir(parents=True, exist_ok=True)
        with _alone(directory):  # two processes must not both take over an ended one's lock
            refuse_other(directory)
            if path.exists():
                print(f"taking over {directory} from process {_ended(path)}, which has ended", file=sys.stderr)
                path.unlink()
            try:
                with open(path, "x") as file:
                    json.dump(mine, file)
            except FileExistsError:  # a process of another host was faster
                refuse_other(directory)
                raise UserError(f"another process has just begun to write {directory}; try again.") from None
    try:
        yield
    finally:
        if path.exists() and files.read_json(path) == mine:
            path.unlink()
        for place in missing:
            if place.exists() and not any(place.iterdir()):
                place.rmdir()


@contextlib.contextmanager
def _alone(directory: Any) -> Iterator[None]:
    """Waits until no other process of this host is in this block. The system lets go of it when a process ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without such locks: the exclusive creation remains
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _ended(path: Any) -> Any:
    return files.read_json(path).get("process")


class Mark:
    """Notices when a run folder is removed, or given to another run, while it is written."""

    def __init__(self, config: Any):
        """`config` is the folder's config.json."""
        self._path, self._text = config, config.read_text()

    def check(self, step: int) -> None:
        """Raises UserError if the file is gone or another's."""
        try:
            what = None if self._path.read_text() == self._text else "is another run's now"
        except (FileNotFoundError, NotADirectoryError):
            what = "is gone"
        if what:
            raise UserError(
                f"{self._path} {what}; the training stopped at step {step} and wrote nothing more. Train in another "
                "--run-dir, or restore the file and train again."
            )


def refuse_other(directory: Any) -> None:
    """Raises UserError if a process that may still run holds the lock."""
    path = directory / NAME
    if not path.exists():
        return
    remedy = "if no process writes this run any more, delete that file"
    holder = files.read_json(path, remedy)
    host, process, started = (holder.get(name) for name in ("host", "process", "started"))
    if type(process) is not int or not isinstance(host, str):
        raise UserError(f"{path} names no host and process; {remedy}.")
    if host == socket.gethostname():
        over = not _runs(process, started)
    else:
        over = _job() is not None and holder.get("job") == _job()
    if over:
        return
    raise UserError(f"process {process} on {host} is writing {directory}; wait for its end, or {remedy} ({path}).")


def _job() -> str | None:
    """The cluster job that this process belongs to; it keeps its name when the scheduler starts it again elsewhere."""
    return os.environ.get("ENGRAX_JOB") or os.environ.get("SLURM_JOB_ID")


def _runs(process: int, started: Any) -> bool:
    """Whether this host's process with this start time still runs; another process may have its number now."""
    if not 0 < process < 1 << 31:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        pass
    now = _started(process)
    return None in (now, started) or now == started


def _started(process: int) -> int | None:
    """The start of a process, in clock ticks since the machine's start; None if the system does not report it."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
