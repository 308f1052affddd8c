"""Trainings that are killed or stopped again and again, at random moments, end to the bit as if left alone."""

import random
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest

from engrax.commands import launch
from engrax.tests.test_launch import TINY
from engrax.tests.test_train_resume import finish, logged, losses, start, wait_for
from engrax.train import runs
from engrax.train.checkpoint import Checkpoints
from engrax.train.trainer import Trainer

EVERY = 20  # steps between checkpoints
WITHIN = 2 * EVERY  # a signal comes within so many steps after a start
EARLY = 4  # one start of so many is killed at any moment before its first step


def end_of(run_dir):
    """(losses by step, the leaves of the last state) of a run."""
    run = runs.open_run(run_dir)
    state, _ = Checkpoints(run_dir).restore(Trainer(run.experiment).abstract_state(), run.experiment.steps)
    return losses(run_dir), [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def check_same(run_dir, undisturbed):
    """Every loss and every array of the last state (parameters, moments, memory, step) has the same bits."""
    (found, state), (wanted, other) = end_of(run_dir), undisturbed
    assert len(wanted) == max(wanted) and found == wanted
    assert [leaf.tobytes() for leaf in state] == [leaf.tobytes() for leaf in other]


# One process.

STEPS = 1000


@pytest.fixture(scope="module")
def undisturbed(root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    finish(start(root, run_dir, steps=STEPS, checkpoint_every=EVERY))
    return end_of(run_dir)


@pytest.mark.long
@pytest.mark.parametrize(
    "signals", [[signal.SIGKILL] * 40, [signal.SIGTERM, signal.SIGINT] * 12], ids=["40 kills", "24 signals to stop"]
)
def test_one_process(root, tmp_path, undisturbed, signals):
    run_dir, chance, seconds = tmp_path / "run", random.Random(0), 5.0
    for n, number in enumerate(signals):
        began, before = time.monotonic(), logged(run_dir)
        process = start(root, run_dir, steps=STEPS, checkpoint_every=EVERY)
        if number == signal.SIGKILL and n % EARLY == EARLY - 1:
            time.sleep(chance.uniform(0.0, seconds))
        else:
            wait_for(process, lambda before=before: logged(run_dir) != before)  # it has cut what the last one left
            seconds, wanted = time.monotonic() - began, logged(run_dir) + chance.randrange(WITHIN)
            wait_for(process, lambda wanted=wanted: logged(run_dir) >= wanted)
            time.sleep(chance.uniform(0.0, 0.01))
        process.send_signal(number)
        out, err = process.communicate(timeout=120)
        if number == signal.SIGKILL:
            assert process.returncode == -number, err[-2000:]
        else:
            step, finished = out.split()
            assert (process.returncode, finished) == (0, "False") and (run_dir / "checkpoints" / step).is_dir()
            assert f"stopped at step {step}; resume with" in err
    _, err = finish(start(root, run_dir, steps=STEPS, checkpoint_every=EVERY))
    assert "resuming" in err
    check_same(run_dir, undisturbed)


# Two processes, which `engrax launch` starts again.


class Killer(threading.Thread):
    """Kills one process of a launcher or both, again and again; `away`: seconds until both took a step again."""

    def __init__(self, stop, run_dir, kills):
        super().__init__()
        self.stop, self.run_dir, self.kills = stop, run_dir, kills
        self.chance, self.done, self.away, self.error = random.Random(0), 0, [], None

    def run(self):
        try:
            seconds, group, killed_at = 5.0, None, None
            while self.done < self.kills:
                self.until(lambda group=group: self.stop.processes and self.stop.processes is not group)
                group, began, before = self.stop.processes, time.monotonic(), logged(self.run_dir)
                if self.done % EARLY == EARLY - 1:
                    time.sleep(self.chance.uniform(0.0, seconds))
                    killed_at = None  # nothing has run since
                else:
                    self.until(lambda before=before: logged(self.run_dir) != before)
                    seconds, wanted = time.monotonic() - began, logged(self.run_dir) + self.chance.randrange(WITHIN)
                    self.away += [time.monotonic() - killed_at] if killed_at else []
                    self.until(lambda wanted=wanted: logged(self.run_dir) >= wanted)
                    killed_at = time.monotonic()
                victims = [[0], [1], [0, 1]][self.done % 3]
                assert all(process.poll() is None for process in group)
                for at in victims:
                    group[at].kill()
                self.done += 1
        except BaseException as error:
            self.error = error
            self.stop.asked = True
            for process in self.stop.processes:
                process.kill()

    def until(self, condition):
        end = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < end and not self.stop.asked
            time.sleep(0.002)


def train_in_two(run_dir, steps, kills):
    """The Killer of a training in two processes."""
    command = [sys.executable, "-m", "engrax.cli", "train", *TINY, "--steps", str(steps), "--run-dir", str(run_dir)]
    command += ["--checkpoint.every", str(EVERY)]
    with launch.Stop() as stop:
        killer = Killer(stop, run_dir, kills)
        killer.start()
        code = launch._until_done(command, str(run_dir), 2, kills, False, stop)
        killer.join()
    assert killer.error is None and (code, killer.done) == (0, kills)
    return killer


@pytest.mark.long
def test_two_processes(tmp_path, monkeypatch):
    """Twenty kills, of either process or of both; the launcher has both running again within a minute."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(launch, "LONGEST_WAIT", 0.1)
    kills = 20
    steps = (kills + 1) * WITHIN
    train_in_two(tmp_path / "alone", steps, 0)
    killer = train_in_two(tmp_path / "killed", steps, kills)
    assert max(killer.away) < 60, killer.away
    assert "resuming" in (tmp_path / "killed" / "logs" / "process_0.log").read_text()
    check_same(tmp_path / "killed", end_of(tmp_path / "alone"))
