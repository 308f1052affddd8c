"""Damaged, contested and full run folders, with real trainings: nothing silent, no traceback, the run continues."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

import engrax
from engrax.errors import UserError
from engrax.tests import damaged_checkpoints as damaged
from engrax.tests.experiments import small, tiny
from engrax.train import CheckpointConfig, loop, metrics, run_lock, runs
from engrax.train import experiment as experiments
from engrax.train.checkpoint import Checkpoints
from engrax.train.loop import train
from engrax.train.trainer import Trainer

# Writes the checkpoints of steps 4 and 8 of an untrained model, on as many devices as there are.
WRITE = """
import sys, jax, jax.numpy as jnp
from engrax.tests.experiments import small
from engrax.train import CheckpointConfig, ParallelConfig
from engrax.train.checkpoint import Checkpoints
from engrax.train.trainer import Trainer
parallel = ParallelConfig(data=2, fsdp=4, zero=3) if jax.device_count() > 1 else ParallelConfig()
trainer = Trainer(small(parallel=parallel))
state, data = trainer.init_state(), trainer.loader("train")
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(keep_last=2))
for step in (4, 8):
    for _ in range(4):
        next(data)
    state = jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), state)
    checkpoints.save(step, state, {"position": data.get_state(), "data_digest": None}, {"validation_loss": 9.0 - step})
checkpoints.close()
"""


LEAST = 300  # damages, those of both checkpoints together


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 8])
def test_every_damage_to_every_file(run_python, tmp_path, devices):
    """Of one process's checkpoint, and of a sharded one (ZeRO 3 on 8 devices), restored on one device."""
    run_dir = tmp_path / "run"
    run_python(WRITE, devices=devices, args=[str(run_dir)])
    trainer = Trainer(small())
    like, data, wanted = trainer.abstract_state(), trainer.loader("train"), {}
    state, position, _, _ = damaged.restored(run_dir, like, data)
    wanted[8] = state, position
    (run_dir / "checkpoints" / "8").rename(tmp_path / "8")
    wanted[4] = damaged.restored(run_dir, like, data)[:2]
    (tmp_path / "8").rename(run_dir / "checkpoints" / "8")
    wrong, seen = [], 0
    for path in damaged.files(run_dir / "checkpoints" / "8"):
        for what, do, undo in damaged.damages(path):
            do()
            try:
                found = damaged.verdict(run_dir, like, data, wanted)
            except Exception as error:
                found = repr(error)
            undo()
            seen += 1
            wrong += [] if found == "noticed" else [(what, found)]
    assert seen >= LEAST / 2 and not wrong, (seen, wrong)
    assert damaged.verdict(run_dir, like, data, wanted) == "harmless", "the damages were undone"


def two_processes(run_dir, steps, *flags):
    """A training by two processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{probe.getsockname()[1]}"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "ENGRAX_DISTRIBUTED": "1", "ENGRAX_COORDINATOR": coordinator}
    processes = [
        subprocess.Popen(
            command(run_dir, steps, *flags),
            env=environment | {"ENGRAX_NUM_PROCESSES": "2", "ENGRAX_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    return errors


CONFIG = os.path.join(os.path.dirname(__file__), "constant_rate.py")
TINY = (
    *(CONFIG, "--batch-size", "4", "--data.seq-len", "32", "--model.dim", "32", "--model.repeat", "1"),
    *("--eval.batches", "1", "--log.every", "1", "--checkpoint.every", "4"),
)


def command(run_dir, steps, *flags):
    train = [sys.executable, "-m", "engrax.cli", "train", *TINY]
    return [*train, "--steps", str(steps), "--run-dir", str(run_dir), *flags]


ZERO_3 = ("--parallel.fsdp", "2", "--parallel.zero", "3")
KINDS = {"one process": 8, "ZeRO 3": 6, "two processes": 6}  # damages to checkpoints that these have written


def told_by(kind, run_dir, steps):
    """Trains in one process, in one with ZeRO 3 on two devices, or in two with ZeRO 3; returns what is said."""
    if kind == "two processes":
        return "".join(two_processes(run_dir, steps, *ZERO_3))
    sharded, environment = kind == "ZeRO 3", dict(os.environ)
    if sharded:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    words = command(run_dir, steps, *(ZERO_3 if sharded else ()))
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_damages_through_the_command_line(tmp_path, kind):
    """Twenty damages in all: `engrax train` says which file is damaged, continues from step 4 and ends with the same
    losses; exit 0, no traceback. What several devices wrote is read by as many at the first damage, then by one."""
    assert sum(KINDS.values()) == 20
    whole = tmp_path / "whole"
    told_by(kind, whole, 8)
    chance, files = random.Random(kind), damaged.files(whole / "checkpoints" / "8")
    assert kind != "two processes" or any("process_1" in str(path) for path in files)
    wanted = [row["loss"] for row in metrics.read(whole) if "loss" in row]
    for trial in range(KINDS[kind]):
        run_dir = tmp_path / str(trial)
        shutil.copytree(whole, run_dir)
        path = run_dir / chance.choice(files).relative_to(whole)
        what, do, _ = chance.choice(list(damaged.damages(path)))
        do()
        told = told_by(kind if trial == 0 else "one process", run_dir, 8)
        assert told.count("is damaged") == 1 and path.name in told and "at step 4" in told, (what, told)
        assert "Traceback" not in told
        assert (run_dir / "checkpoints" / "8").is_dir() and (run_dir / "checkpoints" / "8.damaged").is_dir()
        assert [row["loss"] for row in metrics.read(run_dir) if "loss" in row] == pytest.approx(wanted, rel=1e-5)


# One writer.


def test_one_of_many_takes_over_the_lock_of_an_ended_process(tmp_path, monkeypatch, capsys):
    directory, held, refused = runs.folder(tmp_path), [], []
    ended = {"host": socket.gethostname(), "process": 0, "started": 1}
    (tmp_path / "lock.json").write_text(json.dumps(ended))
    begin, ended_in = threading.Barrier(8), run_lock._ended

    def slowly(path):  # between the look at the old lock and its removal
        found = ended_in(path)
        time.sleep(0.1)
        return found

    monkeypatch.setattr(run_lock, "_ended", slowly)

    def take():
        begin.wait()
        try:
            with run_lock.held(directory):
                held.append(1)
                time.sleep(0.3)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1 and len(refused) == 7 and all("is writing" in error for error in refused)
    assert capsys.readouterr().err == f"taking over {directory} from process 0, which has ended\n"


def test_a_lock_that_is_anothers_by_now_stays(tmp_path):
    with run_lock.held(runs.folder(tmp_path)):
        (tmp_path / "lock.json").write_text('{"host": "other", "process": 7}')
    assert (tmp_path / "lock.json").exists()


def test_a_folder_that_is_gone_or_anothers_is_noticed(tmp_path):
    path = runs.folder(tmp_path) / "config.json"
    path.write_text("{}")
    mark = run_lock.Mark(path)
    mark.check(3)
    path.write_text("{ }")
    with pytest.raises(UserError, match="config.json is another run's now; the training stopped at step 3"):
        mark.check(3)
    path.unlink()
    with pytest.raises(UserError, match="config.json is gone; the training stopped at step 4"):
        mark.check(4)


def test_a_training_that_another_one_overtook_writes_nothing(tmp_path, monkeypatch):
    """The other one saved and ended between this one's look at the checkpoints and its lock."""
    checkpoint = tmp_path / "run" / "checkpoints" / "4"
    monkeypatch.setattr(loop, "refuse_leaks", lambda *_: checkpoint.mkdir(parents=True))
    with pytest.raises(UserError, match="another process has trained .* in the meantime; start again"):
        train(tiny(), tmp_path / "run", progress=False)
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == ["4", "checkpoints"]


@pytest.mark.deep
def test_a_training_stops_when_its_folder_becomes_anothers(tmp_path, monkeypatch):
    write = metrics.MetricsWriter.write

    def and_remove(self, step, values):
        write(self, step, values)
        if step == 6:
            (self.path.parent / "config.json").write_text("{}")

    monkeypatch.setattr(metrics.MetricsWriter, "write", and_remove)
    with pytest.raises(UserError, match="is another run's now; the training stopped at step 7"):
        train(small(checkpoint=CheckpointConfig(every=4)), tmp_path / "run", progress=False)
    assert Checkpoints(tmp_path / "run").steps() == [4]
    assert metrics.read(tmp_path / "run")[-1]["step"] == 6
    assert (tmp_path / "run" / "config.json").read_text() == "{}"


@pytest.mark.long
def test_a_second_training_is_refused_while_the_first_runs(tmp_path):
    first = subprocess.Popen(command(tmp_path / "run", 100_000), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.1)
        second = subprocess.run(command(tmp_path / "run", 100_000), capture_output=True, text=True)
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        assert f"process {first.pid} on {socket.gethostname()} is writing" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    third = subprocess.run(command(tmp_path / "run", 8), capture_output=True, text=True)
    assert f"taking over {tmp_path / 'run'} from process {first.pid}" in third.stderr


# Readers beside a training.


TEXTS = """
import pathlib, sys
from engrax.tests.run_folders import text_experiment
from engrax.train import CheckpointConfig
from engrax.train.loop import train
folder = pathlib.Path(sys.argv[1])
checkpoint = CheckpointConfig(every=1, keep_last=1, keep_best=0)
train(text_experiment(folder, steps=100_000, checkpoint=checkpoint), folder / "run", progress=False)
"""


@pytest.mark.long
def test_generating_a_hundred_times_while_every_step_replaces_the_checkpoint(tmp_path, capfd):
    """A hundred times from Python, and three times from the command line."""
    run_dir, seen = tmp_path / "run", set()
    training = subprocess.Popen([sys.executable, "-c", TEXTS, str(tmp_path)], stderr=subprocess.DEVNULL)
    generate = [sys.executable, "-m", "engrax.cli", "generate", str(run_dir), "--prompt", "hello", "--tokens", "2"]
    try:
        deadline = time.monotonic() + 240
        while not (run_dir / "checkpoints").exists() or not Checkpoints(run_dir).steps():
            assert time.monotonic() < deadline and training.poll() is None
            time.sleep(0.1)
        for _ in range(100):
            assert engrax.generate(run_dir, "hello", tokens=1)
            seen.add(Checkpoints(run_dir).steps()[-1])
        for _ in range(3):
            done = subprocess.run(generate, capture_output=True, text=True)
            assert done.returncode == 0 and "damaged" not in done.stderr, done.stderr
        assert training.poll() is None
    finally:
        training.kill()
        training.wait()
    told = capfd.readouterr().err
    assert "damaged" not in told and len(seen) > 20, (len(seen), told)
    print(f"{told.count('is gone')} of them went while they were read; {len(seen)} different ones were the newest")


# A full disk.


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_small_disk_that_fills_up(tmp_path, capsys):
    """Nothing is lost: the run continues, and saves once there is room; its losses are those of a run that had room."""
    disk, filler = tmp_path / "disk", tmp_path / "disk" / "filler"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no small disk can be mounted here")
    write = metrics.MetricsWriter.write

    def and_fill(self, step, values):
        write(self, step, values)
        if step == 6:
            with open(filler, "wb", buffering=0) as file:
                try:
                    while file.write(bytes(512)):
                        pass
                except OSError:
                    pass
        elif step == 14:
            filler.unlink()

    try:
        experiment = experiments.replace(small(checkpoint=CheckpointConfig(every=4, keep_best=0)), {"steps": 20})
        train(experiment, tmp_path / "room", progress=False)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(metrics.MetricsWriter, "write", and_fill)
            capsys.readouterr()
            assert train(experiment, disk / "run", progress=False).finished
        told = capsys.readouterr().err
        full = [line for line in told.splitlines() if "disk is full" in line]
        assert 1 <= len(full) <= 4 and "step 8 was not saved" in told and "Traceback" not in told, told
        assert Checkpoints(disk / "run").steps() == [16, 20]
        rows = [metrics.read(folder) for folder in (disk / "run", tmp_path / "room")]
        assert [[row["loss"] for row in run] for run in rows][0] == [row["loss"] for row in rows[1]]
        like = Trainer(experiment).abstract_state()
        states = [Checkpoints(folder).restore(like, 20)[0] for folder in (disk / "run", tmp_path / "room")]
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *states)))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
