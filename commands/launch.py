"""`engrax launch`: starts the processes of a training, and starts all of them again after a death."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from engrax.commands.common import parser_of, split_help
from engrax.errors import Exit, UserError
from engrax.flags import filled

EXAMPLE = "engrax launch quickstart --processes 2 --run-dir runs/two --steps 100"

FINAL = (Exit.REFUSED, Exit.DAMAGED, Exit.DIVERGED, Exit.INTERRUPTED, Exit.STOPPED)  # a start would not change these
GRACE_DEATH, GRACE = 5.0, 60.0  # seconds that the others have after the first end: a death, or any other
LONGEST_WAIT, LASTED = 60.0, 600.0  # seconds before a start, at most; a round of so many starts the waits again
LOST = b"JAX distributed service detected fatal errors"  # what JAX writes before it ends a process that lost another
WORDS = {
    Exit.FINISHED: "finished",
    Exit.FAILED: "failed",
    Exit.REFUSED: "refused",
    Exit.DAMAGED: "found no sound checkpoint",
    Exit.DIVERGED: "diverged",
    Exit.PEER_LOST: "lost another process",
    Exit.HUNG: "hung",
    Exit.INTERRUPTED: "was interrupted",
    Exit.STOPPED: "stopped",
}
NUMBERS = ("ENGRAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "JOB_COMPLETION_INDEX", "TPU_WORKER_ID")


def run(args: list[str]) -> int:
    """Runs the command and returns the exit code of the training."""
    parser = parser_of(
        "launch",
        EXAMPLE,
        "Starts `engrax train CONFIG` in several processes of this machine. When one dies, all are started again and "
        "the run resumes. What they print is kept in RUN/logs. With ENGRAX_DISTRIBUTED=1 it starts one process of a "
        "larger job: see docs/machines.md.",
    )
    parser.add_argument("config", type=filled, help="what `engrax train` takes; flags of its fields may follow")
    parser.add_argument("--run-dir", type=filled, help="the run folder (default: runs/CONFIG)")
    parser.add_argument("--processes", type=int, default=1, help="processes; this machine's GPUs are divided over them")
    parser.add_argument("--restarts", type=int, default=10, help="how many times all are started again, at most")
    known, rest = split_help(parser, args, EXAMPLE)
    if {"-h", "--help"} & {*rest}:
        from engrax.commands import train

        return train.run([known.config, *rest])
    joined = os.environ.get("ENGRAX_DISTRIBUTED") == "1"
    if known.processes < 1 or (joined and known.processes > 1):
        why = "with ENGRAX_DISTRIBUTED=1 each launcher starts one" if joined else "at least 1 is needed"
        raise UserError(f"--processes {known.processes}: {why}.")
    run_dir = known.run_dir or _run_dir(known.config)
    command = [sys.executable, "-m", "engrax.cli", "train", known.config, *rest, "--run-dir", run_dir]
    missing = [place for place in Path(run_dir).parents if not place.exists()]
    with Stop() as stop:
        code = _until_done(command, run_dir, known.processes, max(known.restarts, 0), joined, stop)
    if code == Exit.REFUSED:
        _remove_if_nothing_else(Path(run_dir), missing)
    return code


def _until_done(command: list[str], run_dir: str, processes: int, restarts: int, joined: bool, stop: "Stop") -> int:
    """Starts the processes until they end with a code that a start would not change."""
    waits = 0
    for start in range(restarts + 1):
        started = time.monotonic()
        group = Group(command, _logs(run_dir), _environments(processes, joined))
        code = group.wait(stop)
        if code == Exit.FINISHED or code in FINAL or stop.asked:
            return code
        if start == restarts:
            break
        waits = 0 if time.monotonic() - started > LASTED else waits
        pause = min(2.0**waits, LONGEST_WAIT)
        waits += 1
        say(f"starting again in {pause:.0f} s (restart {start + 1} of {restarts})")
        if stop.wait(pause):
            return Exit.STOPPED
    if restarts:
        say(f"gave up after {restarts} restarts; the same command resumes the run")
    return code


class Stop:
    """Passes SIGTERM and Ctrl-C on to the processes, after which nothing is started again."""

    def __init__(self):
        self.asked = False
        self.processes: list[subprocess.Popen] = []

    def __enter__(self) -> "Stop":
        self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """Waits, and says whether a stop was asked for."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.1)
        return self.asked


class Group:
    """The processes of one start; `environments` are their numbers and what is added to the environment of each."""

    def __init__(self, command: list[str], logs: Path, environments: dict[int, dict[str, str]]):
        self.started, self.several = time.monotonic(), len(environments) > 1
        self.logs = {number: logs / f"process_{number}.log" for number in environments}
        self.processes, self._offsets, self._pumps = {}, {}, []
        logs.mkdir(parents=True, exist_ok=True)
        say(f"starting {len(environments)} process(es); their output is kept in {logs}")
        for number, added in environments.items():
            log = self.logs[number].open("ab", buffering=0)
            self._offsets[number] = log.tell()
            process = subprocess.Popen(
                command,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "ENGRAX_LOG": str(self.logs[number]), **added},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches it once, through `Stop`
            )
            self.processes[number] = process
            pump = threading.Thread(target=_pump, args=(process.stdout, log, f"[{number}] " if number else ""))
            pump.start()
            self._pumps.append(pump)

    def wait(self, stop: Stop) -> int:
        """Waits for all, and ends the others some time after the first. Returns the exit code of the whole."""
        stop.processes = list(self.processes.values())
        codes: dict[int, int] = {}
        deadline, killed = float("inf"), False
        while len(codes) < len(self.processes):
            for number in self.processes.keys() - codes.keys():
                code = self.processes[number].poll()
                if code is not None:
                    codes[number] = self._say_end(number, code, killed)
                    final = code == Exit.FINISHED or code in FINAL
                    deadline = min(deadline, time.monotonic() + (GRACE if final else GRACE_DEATH))
            if time.monotonic() > deadline and not killed:
                killed = True
                for number in self.processes.keys() - codes.keys():
                    self.processes[number].kill()
            time.sleep(0.1)
        for pump in self._pumps:
            pump.join()
        return verdict(list(codes.values()))

    def _say_end(self, number: int, code: int, killed: bool) -> int:
        """Prints how a process ended, and returns its exit code; that of a signal is 128 more, as in a shell."""
        if code == -signal.SIGABRT and LOST in self.logs[number].read_bytes()[self._offsets[number] :]:
            code = Exit.PEER_LOST
        words = WORDS.get(code, f"ended with exit code {code}")
        if code < 0:
            words = "was ended here" if killed else f"was killed by {signal.Signals(-code).name}"
        say(f"process {number} {words} after {time.monotonic() - self.started:.0f} s")
        if killed and code < 0:
            return Exit.PEER_LOST
        return code if code >= 0 else 128 - code


def verdict(codes: list[int]) -> int:
    """The exit code of the whole: a final one, else that of a death, else of one that lost another process."""
    for code in FINAL:
        if code in codes:
            return code
    deaths = [code for code in codes if code not in (Exit.FINISHED, Exit.PEER_LOST)]
    return (deaths or [code for code in codes if code] or [Exit.FINISHED])[0]


def _pump(stream: Any, log: Any, prefix: str) -> None:
    """Copies the lines of a process to its log and to stderr."""
    with log:
        for line in stream:
            log.write(line)
            sys.stderr.write(prefix + line.decode(errors="replace"))
            sys.stderr.flush()


def say(sentence: str) -> None:
    """Prints one line of the launcher."""
    print(f"launch: {sentence}", file=sys.stderr, flush=True)


def _run_dir(config: str) -> str:
    """The run folder that `engrax train` would take."""
    return config if (Path(config) / "config.json").exists() else f"runs/{Path(config).stem}"


def _logs(run_dir: str) -> Path:
    """The folder of the logs: in the run folder, or for one in a bucket, which cannot append, in ./logs."""
    return Path("logs") / run_dir.rstrip("/").split("/")[-1] if "://" in run_dir else Path(run_dir) / "logs"


def _environments(processes: int, joined: bool) -> dict[int, dict[str, str]]:
    """{a process's number: what is added to its environment}."""
    if joined or processes == 1:
        number = next((os.environ[name] for name in NUMBERS if joined and os.environ.get(name, "").isdigit()), "0")
        return {int(number): {}}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    same = {"ENGRAX_DISTRIBUTED": "1", "ENGRAX_COORDINATOR": coordinator, "ENGRAX_NUM_PROCESSES": str(processes)}
    gpus = _gpus()
    if len(gpus) % processes:
        raise UserError(f"the {len(gpus)} GPUs of this machine do not divide over {processes} processes.")
    share = len(gpus) // processes
    own = [
        {"CUDA_VISIBLE_DEVICES": ",".join(gpus[share * n : share * (n + 1)])} if gpus else {} for n in range(processes)
    ]
    return {n: {**same, "ENGRAX_PROCESS_ID": str(n), **own[n]} for n in range(processes)}


def _gpus() -> list[str]:
    """The NVIDIA GPUs that JAX would see here, by the names that CUDA_VISIBLE_DEVICES takes."""
    if os.environ.get("JAX_PLATFORMS", "").startswith(("cpu", "tpu")):
        return []
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60).stdout
    return [str(n) for n, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


def _remove_if_nothing_else(run_dir: Path, missing: list[Path]) -> None:
    """Removes a run folder that holds nothing but logs, since the training was refused before its start; then its empty
    parents of those that were `missing`."""
    if run_dir.is_dir() and [entry.name for entry in run_dir.iterdir()] == ["logs"]:
        shutil.rmtree(run_dir, ignore_errors=True)  # another launcher of the job may do the same
    for place in missing:
        if place.is_dir() and not any(place.iterdir()):
            place.rmdir()
