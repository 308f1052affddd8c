"""The launch scripts, run as they stand against stand-ins for `srun` and `gcloud`; the training they start is real."""

import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from engrax.commands import launch
from engrax.errors import Exit, UserError
from engrax.train import distributed

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"

# Attention alone compiles fastest; the scripts are what is tested. A constant rate lets a run continue for longer.
CONFIG = ROOT / "tests" / "constant_rate.py"
TINY = (
    *(str(CONFIG), "--batch-size", "4", "--data.seq-len", "32", "--model.dim", "32", "--model.repeat", "1"),
    *("--eval.batches", "1", "--log.every", "1"),
)

# Starts two processes the way SLURM does on one node.
SRUN = """#!{python}
import os, socket, subprocess, sys

def free(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0

words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
job = next(job for job in range(os.getpid() % 4000, 8000) if free(job % 4096 + 61440))  # JAX's port for a job
processes = []
for rank in range(2):
    slurm = dict(JOB_ID=job, STEP_NODELIST="localhost", NTASKS=2, PROCID=rank, LOCALID=rank, STEP_NUM_NODES=1)
    slurm = {{"SLURM_" + name: str(value) for name, value in slurm.items()}}
    processes.append(subprocess.Popen(words, env={{**os.environ, **slurm}}))
codes = [process.wait() for process in processes]
print("srun: exit codes", *codes)
sys.exit(max(map(abs, codes)))
"""

# Notes what it is asked; answers with the states of $STATES (then READY) and ends `train` with the codes of $CODES.
GCLOUD = """#!/usr/bin/env bash
echo "$*" | tr '\\n' ' ' >>"$ASKED"; echo >>"$ASKED"
case "$*" in
    *" scp "*) for word; do case $word in *.tar.gz) [ -f "$word" ] && cp "$word" "$ASKED.tar.gz" ;; esac; done ;;
    *describe*) state=$(head -n 1 "$STATES"); sed -i 1d "$STATES"; echo "${state:-READY}" ;;
    *"engrax launch"*)
        code=$(head -n 1 "$CODES"); sed -i 1d "$CODES"
        exit "$code" ;;
esac
"""


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def shell(tmp_path):
    """`run(*words, **variables)` -> finished process; ENGRAX is the engrax under test, PATH begins with `bin`."""
    (tmp_path / "bin").mkdir()
    engrax = script(tmp_path / "bin" / "engrax-here", f'#!/bin/sh\nexec "{sys.executable}" -m engrax.cli "$@"\n')

    def run(*words, **variables):
        slurm = [name for name in os.environ if name.startswith(("SLURM_", "ENGRAX", "XLA_FLAGS"))]
        environment = {name: value for name, value in os.environ.items() if name not in slurm}
        environment |= {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "ENGRAX": str(engrax),
            "JAX_PLATFORMS": "cpu",
        }
        environment |= {name: str(value) for name, value in variables.items()}
        command = [str(word) for word in words]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)

    return run


def rows(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows(run_dir) if "loss" in row}


@pytest.mark.deep
def test_two_slurm_processes_train_as_one(shell, tmp_path):
    """slurm.sbatch with two tasks, and local.sh with two devices: one run folder each, the same losses."""
    script(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    run_dir = tmp_path / "slurm"
    finished = shell(
        "bash", LAUNCH / "slurm.sbatch", *TINY, "--steps", "4", "--run-dir", run_dir, SLURM_SUBMIT_DIR=ROOT
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "srun: exit codes 0 0" in finished.stdout
    assert len(list(tmp_path.rglob("metrics.jsonl"))) == 1
    written = [row["step"] for row in rows(run_dir) if "loss" in row]
    assert written == [1, 2, 3, 4], "two processes wrote the metrics"

    one = shell("bash", LAUNCH / "local.sh", *TINY, "--steps", "6", "--run-dir", "local", DEVICES=2)
    assert one.returncode == 0, one.stdout + one.stderr
    wanted = losses(tmp_path / "local")
    assert losses(run_dir) == pytest.approx({step: wanted[step] for step in range(1, 5)}, rel=1e-5)

    # What two processes saved, one process on one device continues with.
    more = shell("bash", LAUNCH / "local.sh", *TINY, "--steps", "6", "--run-dir", run_dir)
    assert more.returncode == 0, more.stdout + more.stderr
    assert losses(run_dir) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.long
def test_sigterm_to_one_of_two_processes_stops_both_at_one_step(tmp_path):
    """When a machine of a job is told to go, then all processes save the same step and the run can be resumed."""
    run_dir = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ENGRAX_DISTRIBUTED": "1", "ENGRAX_COORDINATOR": coordinator}
    command = [sys.executable, "-m", "engrax.cli", "train", *TINY, "--steps", "5000", "--run-dir", str(run_dir)]
    processes = [
        subprocess.Popen(
            command,
            env=environment | {"ENGRAX_NUM_PROCESSES": "2", "ENGRAX_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "metrics.jsonl").exists() or len(losses(run_dir)) < 3:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGTERM)
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [143, 143], errors
    step = max(losses(run_dir))
    assert step < 5000 and f"stopped at step {step}; resume with" in errors[0], errors
    assert [int(folder.name) for folder in (run_dir / "checkpoints").iterdir() if folder.name.isdigit()] == [step]


@pytest.mark.parametrize(
    "codes, wanted",
    [([0, 0], 0), ([74, 2], 2), ([143, 143], 143), ([137, 74], 137), ([74, 74], 74), ([0, 74], 74), ([1, 4], 4)],
)
def test_the_exit_code_of_several_processes(codes, wanted):
    assert launch.verdict(codes) == wanted


# Notes its number, and ends as $CODES says: one code a line for every process of every start.
PROGRAM = """
import os, signal, sys
at = int(os.environ["ENGRAX_PROCESS_ID"])
starts = open(os.environ["NOTES"] + str(at), "a+")
starts.write("x"), starts.flush(), starts.seek(0)
code = int(os.environ["CODES"].split()[len(starts.read()) - 1].split(",")[at])
print("JAX distributed service detected fatal errors" if code == -6 else "native noise" if code else "fine")
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@pytest.mark.parametrize(
    "codes, restarts, code, starts",
    [
        ("-9,74 0,0", 3, 0, 2),
        ("-9,-6 0,0", 3, 0, 2),
        ("2,2 0,0", 3, 2, 1),
        ("1,74 75,74 3,3", 3, 3, 3),
        ("-9,74 -9,74 0,0", 1, 137, 2),
    ],
)
def test_all_are_started_again_after_a_death(tmp_path, monkeypatch, capsys, codes, restarts, code, starts):
    """When a process dies, then all start again, but not after an end that a start would not change."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("CODES", codes)
    monkeypatch.setenv("NOTES", str(tmp_path / "starts"))
    monkeypatch.setattr(launch, "LONGEST_WAIT", 0.1)
    command = [sys.executable, "-c", PROGRAM]
    with launch.Stop() as stop:
        assert launch._until_done(command, str(tmp_path / "run"), 2, restarts, False, stop) == code
    assert [len((tmp_path / f"starts{number}").read_text()) for number in (0, 1)] == [starts, starts]
    told = capsys.readouterr().err
    assert told.count("launch: process 1 ") == starts and ("was killed by SIGKILL" in told) == ("-9" in codes)
    assert ("process 1 lost another process" in told) == ("74" in codes or "-6" in codes)
    assert (tmp_path / "run" / "logs" / "process_0.log").read_text().count("\n") == starts


def test_a_refused_launch_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch, "_until_done", lambda *args: (tmp_path / "runs/a/logs").mkdir(parents=True) or 2)
    assert launch.run(["quickstart", "--run-dir", "runs/a"]) == 2 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds, told", [("1", "at least 2"), ("0", "at least 2"), ("x", "no whole number")])
def test_a_heartbeat_that_makes_no_sense_is_refused(monkeypatch, seconds, told):
    monkeypatch.setenv("ENGRAX_HEARTBEAT", seconds)
    with pytest.raises(UserError, match=f"ENGRAX_HEARTBEAT.*{told}"):
        distributed.heartbeat_seconds()


# A training on a folder of texts, whose path may differ between machines.
TEXTS = """
import dataclasses
from engrax.data import TextFolder
from engrax.tests import constant_rate

def config():
    made = constant_rate.config()
    model = dataclasses.replace(made.model, vocab_size=256)
    return dataclasses.replace(made, model=model, data=TextFolder(path="texts"))
"""
OTHER_FIELDS = 'set -- "$@" --seed 1 --optimizer.learning-rate 0.1'
OTHER_MACHINE = 'set -- "$@" --data.path others; export PYTHONPATH="$PWD/versions:$PYTHONPATH"'


@pytest.mark.deep
@pytest.mark.parametrize(
    "change, told",
    [
        (OTHER_FIELDS, ["seed (1, not 0)", "optimizer.learning_rate (0.1, not 0.005)"]),
        (OTHER_MACHINE, ["optax (9.9.9, not ", "data_digest ("]),
    ],
    ids=["seed and rate", "data and version"],
)
def test_two_processes_that_differ_refuse_together(shell, tmp_path, change, told):
    """Both refuse within 30 seconds, in one line each, before anything is written."""
    for folder, text in (("texts", "hello "), ("others", "hullo ")):
        (tmp_path / folder).mkdir()
        for n in range(4):
            (tmp_path / folder / f"{n}.txt").write_text(text * (40 + n))
    (tmp_path / "versions" / "optax-9.9.9.dist-info").mkdir(parents=True)
    (tmp_path / "versions" / "optax-9.9.9.dist-info" / "METADATA").write_text("Name: optax\nVersion: 9.9.9\n")
    (tmp_path / "mine.py").write_text(TEXTS)
    different = script(
        tmp_path / "bin" / "different",
        f'#!/bin/sh\n[ "$SLURM_PROCID" = 1 ] && {{ {change}; }}\nexec "{sys.executable}" -m engrax.cli "$@"\n',
    )
    script(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    started, run_dir = time.monotonic(), tmp_path / "run"
    words = ("bash", LAUNCH / "slurm.sbatch", tmp_path / "mine.py", *TINY[1:], "--steps", "4", "--run-dir", run_dir)
    finished = shell(*words, SLURM_SUBMIT_DIR=ROOT, ENGRAX=different)
    assert finished.returncode == 2 and time.monotonic() - started < 30, finished.stderr
    assert "srun: exit codes 2 2" in finished.stdout
    lines = [line for line in finished.stderr.splitlines() if "engrax:" in line]
    assert len(lines) == 2 and all("the processes differ: process 1 in " in line for line in lines), lines
    assert all(words in line for line in lines for words in told)
    assert "Traceback" not in finished.stderr and not run_dir.exists()


def test_slurm_hands_on_the_error(shell, tmp_path):
    script(tmp_path / "bin" / "srun", SRUN.format(python=sys.executable))
    finished = shell("bash", LAUNCH / "slurm.sbatch", "nonesuch", "--run-dir", tmp_path / "a", SLURM_SUBMIT_DIR=ROOT)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr


@pytest.mark.parametrize(
    "words, message", [(["quickstart"], "--run-dir"), (["quickstart", "--steps", "3"], "--run-dir")]
)
def test_slurm_wants_a_run_folder(shell, words, message):
    finished = shell("bash", LAUNCH / "slurm.sbatch", *words, SLURM_SUBMIT_DIR=ROOT)
    assert (finished.returncode, message in finished.stderr) == (2, True)


def test_slurm_wants_to_be_submitted_from_the_checkout(shell, tmp_path):
    finished = shell("bash", LAUNCH / "slurm.sbatch", "quickstart", "--run-dir", "a", SLURM_SUBMIT_DIR=tmp_path)
    assert (finished.returncode, "root of the checkout" in finished.stderr) == (2, True)


def test_local_says_when_engrax_is_absent(shell, tmp_path):
    copy = tmp_path / "checkout"
    (copy / "launch").mkdir(parents=True)
    for name in ("local.sh", "engrax.sh"):
        (copy / "launch" / name).write_bytes((LAUNCH / name).read_bytes())
    finished = shell("bash", copy / "launch" / "local.sh", "quickstart", ENGRAX="", PATH="/usr/bin:/bin")
    assert (finished.returncode, "not installed" in finished.stderr) == (2, True)


@pytest.fixture
def tpu_pod(shell, tmp_path):
    """Returns `run(codes, states) -> (finished, what gcloud was asked)` of tpu_pod.sh."""
    script(tmp_path / "bin" / "gcloud", GCLOUD)
    files = {name: tmp_path / name.lower() for name in ("ASKED", "CODES", "STATES")}

    def run(codes, states=(), words=("quickstart", "--run-dir", "gs://bucket/a run")):
        files["ASKED"].write_text("")
        files["CODES"].write_text("".join(f"{code}\n" for code in codes))
        files["STATES"].write_text("".join(f"{state}\n" for state in states))
        finished = shell("bash", LAUNCH / "tpu_pod.sh", "slice", "zone-a", *words, WAIT=0, RETRIES=5, **files)
        return finished, files["ASKED"].read_text().splitlines()

    return run


def of_kind(asked, text):
    return [line for line in asked if text in line]


def test_tpu_pod_resumes_until_the_run_is_done(tpu_pod, tmp_path):
    finished, asked = tpu_pod([255, 143, 1, 0])
    assert finished.returncode == 0, finished.stderr
    training = of_kind(asked, "engrax launch")
    assert len(training) == 4 and len(set(training)) == 1
    assert "--worker=all" in training[0] and "--zone=zone-a" in training[0]
    assert "ENGRAX_DISTRIBUTED=1" in training[0] and r"gs://bucket/a\ run" in training[0]
    assert len(of_kind(asked, " scp ")) == 1, "the checkout is copied once"
    with tarfile.open(tmp_path / "asked.tar.gz") as archive:
        copied = set(archive.getnames())
    assert {"setup.py", "launch/venv.sh", "train/loop.py"} <= copied and not any(".venv" in name for name in copied)


def test_tpu_pod_waits_for_the_slice_and_installs_anew(tpu_pod):
    finished, asked = tpu_pod([255, 0], states=["READY", "PREEMPTED"])
    assert finished.returncode == 0, finished.stderr
    assert len(of_kind(asked, " scp ")) == 2 and len(of_kind(asked, "engrax launch")) == 2


@pytest.mark.parametrize("code", [Exit.REFUSED, Exit.DAMAGED, Exit.DIVERGED])
def test_tpu_pod_does_not_repeat_a_mistake(tpu_pod, code):
    finished, asked = tpu_pod([int(code), 0])
    assert finished.returncode == code
    assert len(of_kind(asked, "engrax launch")) == 1


def test_tpu_pod_gives_up(tpu_pod):
    finished, asked = tpu_pod([1] * 9)
    assert finished.returncode == 1 and "gave up" in finished.stderr
    assert len(of_kind(asked, "engrax launch")) == 5


def test_tpu_pod_wants_a_bucket(tpu_pod):
    finished, asked = tpu_pod([0], words=("quickstart", "--run-dir", "runs/a"))
    assert finished.returncode == 2 and not asked
