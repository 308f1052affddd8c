"""A run that is killed, stopped or moved to other devices continues with the same numbers."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

TRAIN = """
import dataclasses, json, sys
from engrax.tests.experiments import small
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig
from engrax.train.loop import train
fields = json.loads(sys.argv[2])
every = fields.pop("checkpoint_every", 5)
settings = dict(checkpoint=CheckpointConfig(every=every), eval=EvalConfig(every=10, batches=1))
# Higher rates amplify the rounding of other layouts.
optimizer = AdamWConfig(learning_rate=3e-3, schedule=CosineConfig(warmup_steps=2))
experiment = small(**settings, optimizer=optimizer, **fields)
result = train(experiment, sys.argv[1])
print(result.step, result.finished)
"""


def start(root, run_dir, devices=1, **fields):
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"  # compiles faster
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, str(run_dir), json.dumps(fields)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out, err


def losses(run_dir):
    """{step: loss} of every logged training step, as written (to the last bit)."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)), "a step is logged twice or out of order"
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def logged(run_dir):
    path = run_dir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def saved(run_dir):
    """The newest checkpoint's step; 0 without one."""
    return max((int(path.name) for path in run_dir.glob("checkpoints/*") if path.name.isdigit()), default=0)


def wait_for(process, condition):
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.stderr.read()[-2000:]
        time.sleep(0.002)


STEPS = 60


@pytest.fixture(scope="module")
def uninterrupted(root, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(root, run_dir, steps=STEPS))
    return losses(run_dir)


@pytest.mark.deep
def test_killed_twice_at_random_moments_ends_with_the_same_losses(root, tmp_path, uninterrupted):
    """tests/test_kills.py (long) does it forty times."""
    chance, run_dir = random.Random(0), tmp_path / "run"
    for kill in range(2):
        process = start(root, run_dir, steps=STEPS)
        # A save has ended in this start, so the next one resumes.
        wait_for(process, lambda kill=kill: saved(run_dir) > 10 * kill)
        time.sleep(chance.uniform(0.0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    _, err = finish(start(root, run_dir, steps=STEPS))
    assert "resuming" in err
    found = losses(run_dir)
    assert len(uninterrupted) == STEPS
    assert found == uninterrupted


@pytest.mark.deep
def test_sigterm_saves_and_says_how_to_resume(root, tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    process = start(root, run_dir, steps=STEPS, checkpoint_every=0)
    wait_for(process, lambda: logged(run_dir) >= 3)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    step, finished = out.split()
    assert finished == "False" and 3 <= int(step) < STEPS
    assert f"stopped at step {step}; resume with: engrax train" in err and str(run_dir) in err
    assert (run_dir / "checkpoints" / step).is_dir()
    finish(start(root, run_dir, steps=STEPS))
    assert losses(run_dir) == uninterrupted


@pytest.mark.deep
def test_saved_on_8_devices_resumes_on_1(root, tmp_path, uninterrupted):
    run_dir = tmp_path / "run"
    parallel = dict(data=2, fsdp=4, zero=3)
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            TRAIN.replace("**fields", "parallel=ParallelConfig(**fields.pop('parallel')), **fields")
            .replace("import AdamWConfig", "import ParallelConfig, AdamWConfig")
            .replace(
                ".loop import train",
                ".loop import train\nimport engrax.train.distributed as d\n"
                "d.StopSignal.reached = lambda self, step: step == 7",
            ),
            str(run_dir),
            json.dumps(dict(steps=STEPS, parallel=parallel)),
        ],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, _ = finish(process)
    assert out.split()[0] == "7"
    from engrax.evals import evaluate

    assert evaluate(run_dir, step=7, batches=1, progress=False).accuracy is not None  # on this process's one device
    finish(start(root, run_dir, steps=STEPS))
    found = losses(run_dir)
    steps = range(1, 16)  # 7 on eight devices, 8 on one; later, training has amplified the difference in rounding
    assert [found[s] for s in steps] == pytest.approx([uninterrupted[s] for s in steps], rel=1e-5)
    import engrax

    _, step = engrax.load(run_dir)
    assert step == STEPS
