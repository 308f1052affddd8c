"""Joining several processes, and stopping them at the same step."""

import os
import signal
import sys
import threading
from types import TracebackType

import jax

from engrax.errors import UserError


def start() -> None:
    """Joins the other processes if ENGRAX_DISTRIBUTED=1.

    `jax.distributed` recognises SLURM, Kubernetes, TPU pods and Open MPI. Elsewhere set ENGRAX_COORDINATOR (host:port),
    ENGRAX_NUM_PROCESSES and ENGRAX_PROCESS_ID. Must run before any other use of a device.
    """
    if os.environ.get("ENGRAX_DISTRIBUTED") != "1" or jax.distributed.is_initialized():
        return
    names = ("ENGRAX_COORDINATOR", "ENGRAX_NUM_PROCESSES", "ENGRAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    if any(given) and not all(given):
        missing = names[[bool(g) for g in given].index(False)]
        raise UserError(f"{missing} is not set; set all of {', '.join(names)}, or none.")
    try:
        if all(given):
            jax.distributed.initialize(given[0], int(given[1]), int(given[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"cannot join the other processes: {str(error).splitlines()[0]}") from error


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
