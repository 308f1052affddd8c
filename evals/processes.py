"""The processes of a sweep, each with its share of the CPU's threads and of the devices."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import jax
from etils import epath

from engrax.errors import UserError
from engrax.evals.trials import Trial
from engrax.train import experiment as experiments
from engrax.train import run_sources

GRACE = 60.0  # seconds in which a training may end its step and save
CUDA = "CUDA_VISIBLE_DEVICES"


def shares(processes: int) -> list[dict[str, str]]:
    """The environment variables of each process that runs at the same time. Raises UserError on a TPU."""
    platform = jax.default_backend()
    if platform == "tpu":
        raise UserError("a TPU serves one process: leave out processes.")
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = len(jax.local_devices()) if platform == "gpu" else 0
    return [share(slot, processes, cpus, devices, os.environ) for slot in range(processes)]


def share(slot: int, processes: int, cpus: int, gpus: int, given: dict[str, str]) -> dict[str, str]:
    """The variables of one process of several: its threads, and with GPUs its own GPUs, or its part of one's memory."""
    threads = str(max(1, cpus // processes))
    flags = given.get("XLA_FLAGS", "")
    if threads == "1":
        flags = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    found = {"NPROC": threads, "OMP_NUM_THREADS": threads, "XLA_FLAGS": flags}  # NPROC: the size of XLA's thread pools
    if gpus:
        names = given[CUDA].split(",") if given.get(CUDA) else [str(i) for i in range(gpus)]
        own = names[slot * gpus // processes : (slot + 1) * gpus // processes]
        if processes > gpus:  # in turn, so that no GPU has two processes more than another
            own = [names[slot % gpus]]
        found |= {CUDA: ",".join(own), "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / -(-processes // gpus):.3f}"}
    return found


def refuse_what_has_no_file(trials: Sequence[Trial]) -> None:
    """Raises UserError if a trial's configs are defined where another process cannot import them."""
    for trial in trials:
        for config in experiments.nested_configs(trial.config):
            if type(config).__module__ == "__main__":
                raise UserError(
                    f"{type(config).__name__} is defined in the script or notebook itself, where other processes do "
                    "not find it: put it into a file of its own and import that, or leave out processes."
                )


class Worker:
    """A process that trains and scores trials, one at a time (`engrax.evals.worker`)."""

    def __init__(self, share: dict[str, str]):
        self.share, self.trial, self.directory = share, None, None
        self.log = tempfile.TemporaryFile()
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)  # what is importable here is there too
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "engrax.evals.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, **share, "PYTHONPATH": path},
        )

    def fileno(self) -> int:
        """For `select`: readable once the trial has ended, or the process."""
        return self.process.stdout.fileno()

    def begin(self, trial: Trial, directory: epath.Path) -> None:
        """Gives the process its next trial."""
        self.trial, self.directory = trial, directory
        self.log.seek(0)  # the process shares this file's position
        self.log.truncate()
        modules = run_sources.own_modules(trial.config)
        task = {"experiment": experiments.to_dict(trial.config), "directory": str(directory), "modules": modules}
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # the process has died; `failure` says how
            pass

    def failure(self) -> str | None:
        """Why the trial that has ended has no score; None if it has one."""
        if answer := self.process.stdout.readline():
            return json.loads(answer)["error"]
        code = self.process.wait()
        self.log.seek(0)
        said = self.log.read().decode(errors="replace").strip()
        log = self.directory.parent / f"{self.directory.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(said + "\n")
        how = (
            f"was ended by {_signal(-code)}"
            if code < 0
            else f"ended with {code}: {(said or 'no word').splitlines()[-1]}"
        )
        return f"its process {how}; the same command continues with it ({log} has what it said)."

    @property
    def alive(self) -> bool:
        """Whether the process can run another trial."""
        return self.process.poll() is None


def _signal(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    return f"{name} (the machine may be out of memory)" if number == signal.SIGKILL else name


def end(workers: Sequence[Worker]) -> None:
    """Ends the processes: a training saves after its step; one that does not end in GRACE seconds is killed."""
    for worker in workers:
        with contextlib.suppress(BrokenPipeError):
            worker.process.stdin.close()
        worker.process.terminate()
    deadline = time.monotonic() + GRACE
    try:
        for worker in workers:
            worker.process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:  # also after a second Ctrl-C
        for worker in workers:
            worker.process.kill()
            worker.process.wait()
            worker.log.close()
            worker.process.stdout.close()
