"""The watchdog: ends a process whose training step hangs, after writing where every thread of it stands."""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator

from etils import epath

from engrax.errors import Exit


class Watchdog:
    """Watches a `with` block that says `alive()` after every step; `seconds` without it, and the process ends.

    The stacks of all threads go to stderr and to `path`, the exit code is `Exit.HUNG`. Nothing is watched before the
    first `alive()`, which the loop says after its first step is compiled. seconds: 0 = nothing is watched.
    """

    def __init__(self, seconds: float, path: epath.Path):
        self._seconds, self._path = seconds, path
        self._deadline: float | None = None
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="engrax-watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def alive(self) -> None:
        """A step has ended, or another begins."""
        self._deadline = time.monotonic() + self._seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Watches nothing in the `with` block, which may take long."""
        watched, self._deadline = self._deadline is not None, None
        try:
            yield
        finally:
            if watched:
                self.alive()

    def rest(self) -> None:
        """Watches nothing until the next `alive()`."""
        self._deadline = None

    def _watch(self) -> None:
        while not self._done.wait(min(self._seconds / 4, 1.0)):
            deadline = self._deadline
            if deadline is not None and time.monotonic() > deadline:
                self._end()

    def _end(self) -> None:
        with tempfile.TemporaryFile("w+") as file:  # faulthandler needs a file of this machine
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        try:
            self._path.write_text(stacks)
            where = f"; the stacks are in {self._path}"
        except OSError as error:
            where = f"; the stacks could not be written to {self._path} ({error.strerror})"
        print(
            f"{stacks}engrax: no step has ended for {self._seconds:g} s, the guard.watchdog{where}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(Exit.HUNG)  # the main thread hangs: nothing else would end it
