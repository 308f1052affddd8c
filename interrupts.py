"""Ctrl-C at any moment of a command: one KeyboardInterrupt, which no library swallows."""

import contextlib
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

LONGEST_IMPORT = 5.0  # seconds that Ctrl-C waits for an import


@contextlib.contextmanager
def handled() -> Iterator[list[float]]:
    """Yields a list that is not empty once Ctrl-C was pressed. KeyboardInterrupt is raised then, but inside an import
    only after it, because libraries turn it into their own errors there. A second Ctrl-C raises it at once."""
    pressed: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return

    def press(number: int, frame: Any) -> None:
        if number == signal.SIGINT:
            pressed.append(time.monotonic())
        if len(pressed) == 1 and _importing(frame) and time.monotonic() < pressed[0] + LONGEST_IMPORT:
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        else:
            raise KeyboardInterrupt

    def lost(error: Any) -> None:  # raised where Python cannot pass it on, as in a destructor
        if issubclass(error.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.02)
        elif not pressed:
            hook(error)

    old = {number: signal.signal(number, press) for number in (signal.SIGINT, signal.SIGALRM)}
    hook, sys.unraisablehook = sys.unraisablehook, lost
    try:
        yield pressed
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook = hook
        for number, handler in old.items():
            signal.signal(number, handler)


def _importing(frame: Any) -> bool:
    """Whether a frame is inside an import."""
    while frame is not None and frame.f_code.co_filename != "<frozen importlib._bootstrap>":
        frame = frame.f_back
    return frame is not None
