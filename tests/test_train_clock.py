"""Tokens per second count training alone: the clock stands still during evaluation and saving."""

import jax.numpy as jnp
import pytest
from etils import epath

from engrax.tests.experiments import tiny
from engrax.train import CheckpointConfig, EvalConfig, LogConfig, guards, metrics
from engrax.train.checkpoint import Checkpoints
from engrax.train.distributed import StopSignal
from engrax.train.loop import Loop
from engrax.train.trainer import Trainer
from engrax.train.watchdog import Watchdog

STEP, VALIDATION, SAVE = 0.5, 30.0, 100.0  # seconds


class Time:
    """A clock that moves only when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def spend(self, seconds, result=None):
        """A stand-in for work: it takes `seconds` and returns `result`."""

        def work(*args):
            self.now += seconds
            return result

        return work


class Data:
    """Endless empty batches."""

    def __next__(self):
        return {}

    def get_state(self):
        return {}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Six steps, a validation after every second and a save after every third: (logged rows, tokens a step, the bar).

    The loop is the real one; steps, validation and saving take the time that they are told to take.
    """
    time = Time()
    monkeypatch.setattr(metrics, "time", time)
    experiment = tiny(steps=6, eval=EvalConfig(every=2), checkpoint=CheckpointConfig(every=3))
    trainer, checkpoints = Trainer(experiment), object.__new__(Checkpoints)
    trainer.__dict__.update(
        put=lambda batch: batch,
        train_step=time.spend(STEP, ({"params": None}, {"loss": jnp.float32(2), "grad_norm": jnp.float32(1)})),
        validate=time.spend(VALIDATION, {"validation_loss": 1.0}),
        diagnose=lambda params: {},
        evaluated=lambda state: None,
    )
    checkpoints.save, checkpoints.directory = time.spend(SAVE), epath.Path(tmp_path) / "checkpoints"
    clock = metrics.Clock()
    tokens = experiment.batch_size * experiment.data.seq_len
    bar = metrics.Progress(0, experiment.steps, tokens, clock, active=False)
    writer = metrics.MetricsWriter(epath.Path(tmp_path), LogConfig(), resumed_at=0, settings={})
    loop = Loop(trainer, checkpoints, writer, bar, clock, Watchdog(0, epath.Path(tmp_path)))
    loop.run({"params": None}, guards.Guarded(Data(), experiment.guard), 0, StopSignal())
    return metrics.read(tmp_path), tokens, bar


def test_tokens_per_second_leave_out_evaluation_and_saves(run):
    rows, tokens, _ = run
    rates = {row["step"]: row["tokens_per_second"] for row in rows if "tokens_per_second" in row}
    assert sorted(rates) == [2, 3, 4, 5, 6]
    assert list(rates.values()) == pytest.approx([tokens / STEP] * 5)
    assert rows[0]["seconds_to_first_step"] == STEP


def test_the_progress_bar_shows_the_same_rate(run):
    _, tokens, bar = run
    assert float(bar.shown["tokens/s"].replace(",", "")) == pytest.approx(tokens / STEP, rel=0.3)
