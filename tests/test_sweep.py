"""Many trials in one folder: several at once, a budget, what fails alone, and what is read instead of run again."""

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from engrax.errors import Diverged, UserError
from engrax.evals import processes, sweep, trials
from engrax.evals.sweep import Score, Trial
from engrax.tests.test_compare import tiny
from engrax.train import runs

RATE = "optimizer.learning_rate"


def some(*rates: float, **fields) -> list[Trial]:
    """A trial for every learning rate."""
    return [Trial(f"a/lr_{rate:g}", tiny(**fields), {RATE: rate}) for rate in rates]


@pytest.fixture
def trained(monkeypatch):
    """The learning rates of the trials that were run. Nothing is trained: 1 diverges, 2 is a mistake, 3 takes 100 s."""
    rates = []

    def train(experiment, directory, progress):
        rate = experiment.optimizer.learning_rate
        rates.append(rate)
        runs.prepare(directory, experiment)
        if rate == 1:
            raise Diverged("not finite")
        if rate == 2:
            raise UserError("this trial is a mistake")
        return type("Result", (), {"finished": True})()

    write = trials._written
    monkeypatch.setattr(trials.loop, "train", train)
    monkeypatch.setattr(sweep, "check", lambda trials, folder: None)
    monkeypatch.setattr(trials, "measure", lambda d: Score(np.full(4, 0.5), np.ones(4)))
    monkeypatch.setattr(trials, "_written", lambda score: write(score) | {"seconds": 100.0})
    return rates


def test_a_trial_that_fails_does_not_end_the_others(tmp_path, trained, capsys):
    """When a trial diverges or is a mistake, then the others run; a second call runs the mistake alone."""
    outcome = sweep.run(some(1, 2, 0.5), tmp_path)
    assert {name: score.mean for name, score in outcome.scores.items()} == pytest.approx(
        {"a/lr_1": float("nan"), "a/lr_0.5": 0.5}, nan_ok=True
    )
    assert outcome.missing == {"a/lr_2": "this trial is a mistake"} and trained == [1, 2, 0.5]
    told = capsys.readouterr().err
    assert "[1/3] a/lr_1: diverged" in told and "[2/3] a/lr_2 has no score: this trial is a mistake" in told
    again = sweep.run(some(1, 2, 0.5), tmp_path)
    assert trained == [1, 2, 0.5, 2] and again.missing == outcome.missing
    with pytest.raises(UserError, match="another experiment: it differs in optimizer.learning_rate"):
        sweep.run([Trial("a/lr_1", tiny(), {RATE: 0.25})], tmp_path)


def test_no_trial_begins_that_the_budget_does_not_allow(tmp_path, trained, capsys):
    """When trials take 100 s, then of two minutes' budget nothing is left for a second one of a new call."""
    sweep.run(some(0.5), tmp_path)
    for minutes in (0, 1.5):
        outcome = sweep.run(some(0.5, 0.25), tmp_path, minutes=minutes)
        assert list(outcome.scores) == ["a/lr_0.5"] and list(outcome.missing) == ["a/lr_0.25"]
        assert f"the {minutes:g} minutes are over: 1 of 2 trials are missing (a/lr_0.25)" in capsys.readouterr().err
    assert trained == [0.5]
    assert not sweep.run(some(0.5, 0.25), tmp_path, minutes=2).missing and trained == [0.5, 0.25]


def test_the_time_left_is_that_of_similar_trials(tmp_path, trained, capsys):
    """When 2 trials of 100 s are open and 4 come later, then ten minutes are left, or five for two processes."""
    account = sweep._Account(some(0.1, 0.2, 0.3), runs.folder(tmp_path), 1, None, True, 4)
    account.ended(account.begin(), Score(np.ones(1), np.ones(1), seconds=100.0))
    assert "[1/3] a/lr_0.1: 1.0000 (10 min left)" in capsys.readouterr().err
    account.processes = 2
    assert account._left() == pytest.approx(5)
    assert account.seconds(Trial("b", tiny(2))) == 100
    account.ended(account.begin(), Score(np.ones(1), np.ones(1), seconds=200.0))
    assert account.seconds(account.open[0]) == 150
    other = Trial("c", dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, dim=32)))
    account.open.append(other)
    account.ended(other, Score(np.ones(1), np.ones(1), seconds=900.0))
    assert account.seconds(account.open[0]) == 150 and account.seconds(other) == 900, "those with its model"


def test_a_folder_of_many_trials_is_soon_read(tmp_path, monkeypatch):
    """When 60 trials have ended, then their settings are worked out a few times each, not once for every other one."""
    every = [Trial(f"a/{seed}", tiny(), {"seed": seed}) for seed in range(60)]
    calls, replace = [], trials.experiments.replace
    monkeypatch.setattr(trials.experiments, "replace", lambda *args: calls.append(None) or replace(*args))
    monkeypatch.setattr(trials, "read", lambda *args: Score(np.ones(1), np.ones(1), seconds=60.0))
    assert len(sweep.run(every, tmp_path, minutes=0, progress=False).scores) == 60
    assert len(calls) < 4 * 60


@pytest.mark.parametrize(
    "wrong, told",
    [
        (lambda folder: sweep.run(some(0.1, 0.1), folder), "two trials have the name"),
        (lambda folder: sweep.run(some(0.1), folder, processes=0), "processes=0 must be at least 1"),
        (lambda folder: sweep.run(some(0.1), folder, minutes=-1), "must not be negative"),
        (lambda folder: Trial("../a", tiny()), "no path inside a folder"),
        (lambda folder: Trial("a", tiny(), {"stepz": 3}), "did you mean 'steps'"),
        (lambda folder: Trial("a", tiny(), {"steps": "many"}), "not of the type wanted"),
        (lambda folder: sweep.run([Trial("a", tiny(batch_size=10**9))], folder), "needs at least"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(tmp_path, wrong, told):
    with pytest.raises(UserError, match=told):
        wrong(tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_every_process_has_its_share_of_the_machine():
    flag = {"XLA_FLAGS": "--a"}
    assert processes.share(0, 2, 8, 0, flag) == {"NPROC": "4", "OMP_NUM_THREADS": "4", "XLA_FLAGS": "--a"}
    assert processes.share(1, 2, 2, 0, flag)["XLA_FLAGS"] == "--a --xla_cpu_multi_thread_eigen=false"
    assert processes.share(2, 3, 2, 0, {})["NPROC"] == "1"
    cuda = lambda processes_, gpus, given={}: [  # noqa: E731
        processes.share(i, processes_, 8, gpus, given)[processes.CUDA] for i in range(processes_)
    ]
    assert cuda(2, 4) == ["0,1", "2,3"] and cuda(2, 2, {processes.CUDA: "5,7"}) == ["5", "7"]
    assert cuda(3, 1) == ["0", "0", "0"] and cuda(4, 2) == ["0", "1", "0", "1"], "as many on each"
    assert processes.share(0, 3, 8, 1, {})["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.300"


def test_configs_of_the_script_itself_have_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tiny().model.mixers[0]), "__module__", "__main__")
    with pytest.raises(UserError, match="put it into a file of its own"):
        processes.refuse_what_has_no_file(some(0.1))


KILL = """
import os, signal, sys
from engrax.evals import sweep
from engrax.evals.processes import Worker
from engrax.tests.test_sweep import tiny, Trial
begin = Worker.begin
def kills(worker, trial, directory):
    begin(worker, trial, directory)
    if trial.name == "killed" and "kill" in sys.argv:
        os.kill(worker.process.pid, signal.SIGKILL)
Worker.begin = kills
trials = [Trial("killed", tiny()), Trial("one", tiny(seed=1)), Trial("wild", tiny(), {"optimizer.learning_rate": 1e30})]
outcome = sweep.run(trials, sys.argv[1], processes=2)
print({name: score.mean == score.mean for name, score in outcome.scores.items()}, outcome.missing)
"""


@pytest.mark.deep
def test_a_killed_process_loses_its_own_trial_alone(run_python, tmp_path):
    """When a process is killed, then its trial is named and the others end; the same call runs that one alone."""
    out = run_python(KILL, devices=1, args=[tmp_path / "s", "kill"])
    assert out.startswith("{'one': True, 'wild': False} {'killed': 'its process was ended by SIGKILL (the machine may")
    assert (tmp_path / "s" / "killed.log").exists()
    out = run_python(KILL, devices=1, args=[tmp_path / "s"])
    assert out.strip() == "{'killed': True, 'one': True, 'wild': False} {}"


@pytest.mark.deep
def test_ctrl_c_ends_every_process(tmp_path):
    """When Ctrl-C is pressed, then the trainings save, their processes end, and the command ends with 130."""
    code = (
        "import sys\nfrom engrax import interrupts\nfrom engrax.evals import sweep\n"
        "from engrax.tests.test_sweep import tiny, Trial\n"
        "trials = [Trial(f'a/{i}', tiny(steps=10**6, seed=i)) for i in range(3)]\n"
        "with interrupts.handled():\n    try:\n        sweep.run(trials, sys.argv[1], processes=2)\n"
        "    except KeyboardInterrupt as stop:\n        print(stop)\n        sys.exit(130)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s")], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    started = [tmp_path / "s" / "a" / str(i) / "metrics.jsonl" for i in range(2)]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text() for path in started) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and out == "stopped; the same command continues from there.\n"
    for path in started:
        assert not (path.parent / "lock.json").exists() and list((path.parent / "checkpoints").iterdir())
