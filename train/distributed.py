"""Joining several processes, stopping them at the same step, and ending them together.

Process 0 holds the coordination service of `jax.distributed`: a key-value store, and heartbeats by which the loss of a
process is noticed. JAX then ends the other processes from C++ (SIGABRT); `engrax launch` says so in one line.
"""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import jax
from jax._src import distributed as jax_distributed  # the key-value store has no public name; Orbax takes it from here

from engrax.errors import Exit, PeerLost, UserError

HEARTBEAT = 15  # seconds without a sign of life after which a process counts as lost; JAX's own default is 100
LINGER = 10.0  # most seconds that process 0, which holds the key-value store, waits for the others to read it
ENDED, HEARD = "engrax/ended", "engrax/heard"  # keys: why the first process ended, and the processes that know


def start() -> None:
    """Joins the other processes if ENGRAX_DISTRIBUTED=1.

    `jax.distributed` recognises SLURM, Kubernetes, TPU pods and Open MPI. Elsewhere set ENGRAX_COORDINATOR (host:port),
    ENGRAX_NUM_PROCESSES and ENGRAX_PROCESS_ID. ENGRAX_HEARTBEAT are the seconds after which a silent process counts as
    lost. Must run before any other use of a device. Raises PeerLost if the others cannot be reached.
    """
    if os.environ.get("ENGRAX_DISTRIBUTED") != "1" or jax.distributed.is_initialized():
        return
    if log := os.environ.get("ENGRAX_LOG"):
        _keep_native_output(log)
    names = ("ENGRAX_COORDINATOR", "ENGRAX_NUM_PROCESSES", "ENGRAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if any(given) and not all(given):
        missing = names[[bool(g) for g in given].index(False)]
        raise UserError(f"{missing} is not set; set all of {', '.join(names)}, or none.")
    numbers = [_whole(name, text) for name, text in zip(names[1:], given[1:]) if text]
    heartbeat = heartbeat_seconds()
    try:
        jax.distributed.initialize(given[0], *numbers, heartbeat_timeout_seconds=heartbeat)
    except ValueError as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        raise PeerLost(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


def heartbeat_seconds() -> int:
    """The value of ENGRAX_HEARTBEAT. Raises UserError if it is below 2 or no whole number."""
    seconds = _whole("ENGRAX_HEARTBEAT", os.environ.get("ENGRAX_HEARTBEAT") or str(HEARTBEAT))
    if seconds < 2:
        raise UserError(f"ENGRAX_HEARTBEAT={seconds} must be at least 2 (seconds).")
    return seconds


def _whole(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UserError(f"{name}={text!r} is no whole number.")
    return int(text)


def _keep_native_output(path: str) -> None:
    """Sends what C++ libraries print to a file. Python's own streams stay where they were."""
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        stream.flush()
        setattr(sys, name, open(os.dup(number), "w", buffering=1, encoding=stream.encoding, errors=stream.errors))
        os.dup2(log, number)


def processes() -> tuple[int, int]:
    """(this process's number, their number), known before any use of a device."""
    state = jax_distributed.global_state
    return (state.process_id, state.num_processes) if state.client else (0, 1)


def store() -> Any:
    """The client of the key-value store. Only where `processes()` are several."""
    return jax_distributed.global_state.client


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends all processes together. An error in one is told to the others, which print it as one line and end with the
    same exit code, or with PEER_LOST if it was a bug. Without an error all wait for each other at the end."""
    me, number = processes()
    if number == 1:
        yield
        return
    ending = threading.Lock()  # held by whoever ends this process: an error here, or what another process told
    listener = threading.Thread(target=_listen, args=(me, number, ending), daemon=True)
    listener.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError):  # a broken connection, perhaps: then JAX ends this process
            time.sleep(heartbeat_seconds() + 5)
        ending.acquire()
        code = getattr(error, "exit_code", Exit.REFUSED if isinstance(error, OSError) else Exit.FAILED)
        code = Exit.INTERRUPTED if isinstance(error, KeyboardInterrupt) else code
        # Python's own end would wait for the others, whose ends it has just caused.
        atexit.register(_leave, code)
        _tell(me, number, code, " ".join(str(error).split()) or type(error).__name__)
        raise
    jax.distributed.shutdown()
    listener.join()


def _tell(me: int, number: int, code: int, sentence: str) -> None:
    told = json.dumps({"process": me, "code": int(code), "sentence": sentence})
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another process was faster, or process 0 is gone
        store().key_value_set(ENDED, told)
    _heard(me, number)


def _listen(me: int, number: int, ending: Any) -> None:  # a threading.Lock, which is no type before Python 3.13
    """Waits for the first process that ends with an error, and ends this one."""
    told = None
    while told is None:
        try:
            told = json.loads(store().blocking_key_value_get(ENDED, 10_000))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                return  # all have finished, or process 0 is lost: then JAX ends this process
    ending.acquire()
    print(f"engrax: process {told['process']}: {told['sentence']}", file=sys.stderr, flush=True)
    _heard(me, number)
    _leave(Exit.PEER_LOST if told["code"] == Exit.FAILED else told["code"])


def _heard(me: int, number: int) -> None:
    """Notes that this process knows of the end. Process 0 waits until all do."""
    end = time.monotonic() + LINGER
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        store().key_value_set(f"{HEARD}/{me}", "")
        while me == 0 and len(store().key_value_dir_get(HEARD)) < number and time.monotonic() < end:
            time.sleep(0.1)


def _leave(code: int) -> None:
    """Ends the process at once; its main thread may wait for another process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a request to stop after the current step; a second Ctrl-C stops at once."""

    def __init__(self):
        self.asked = False
        self.number: int | None = None  # the signal's number
        self._old: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            # With several processes, JAX handles SIGTERM itself, as a preemption notice to all of them.
            handled = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
            self._old = {number: signal.signal(number, self._ask) for number in handled}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        self.asked, self.number = True, self.number or number
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # so that all processes agree on the step

    def reached(self, step: int) -> bool:
        """Whether the run must stop after `step`; several processes agree on the step."""
        if jax.process_count() == 1:
            return self.asked
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))
