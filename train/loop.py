"""The training loop, shared by all models and parallelism strategies.

The order is a contract:

    probe or restore -> [next batch -> dispatch step k -> read metrics of step k-1 -> evaluate -> save] -> final save

- A fresh training is probed first: the probe reads the first batch and refuses a model that sees the future, before
  anything is written.
- The host does not wait for the device inside the loop: metrics are read one step late, when they are ready.
- The data position after batch k is saved with the state after step k, so a resumed run reads batch k+1.
- Evaluation precedes saving, so each checkpoint has its validation loss.
- The clock for tokens per second pauses during evaluation and saving.
- Inside the loop, data moves between host and device only by explicit transfers.
- The compiled step decides whether a step is bad (`guards`); the loop learns it with the metrics, one step late.
"""

import contextlib
import dataclasses
import functools
import json
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from engrax.errors import Diverged, UserError
from engrax.files import refuse_links, write_atomically
from engrax.train import agreement, guards, metrics, resume, run_lock, runs, starting
from engrax.train import experiment as experiments
from engrax.train.checkpoint import Checkpoints, Damaged
from engrax.train.distributed import StopSignal
from engrax.train.experiment import Experiment
from engrax.train.fit import refuse_what_does_not_fit
from engrax.train.host import keep_compiled_programs, keep_freed_memory
from engrax.train.probe import refuse_leaks
from engrax.train.profile import Speed, Trace
from engrax.train.train_step import resolve_dtype
from engrax.train.trainer import Trainer
from engrax.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a finished or interrupted call of `train`."""

    run_dir: epath.Path
    step: int  # steps done
    finished: bool  # False if a signal stopped it
    metrics: dict[str, float]  # the last ones
    interrupted: bool = False  # the signal was Ctrl-C


def train(
    experiment: Experiment,
    run_dir: epath.PathLike,
    *,
    source: epath.PathLike | None = None,
    progress: bool = True,
) -> Result:
    """Trains in `run_dir` and resumes a run found there; `source`, the user's config file, is copied into it.

    Raises UserError before the first step if the folder holds another experiment, or if mesh, batch or data do not fit.
    """
    clock = metrics.Clock()
    keep_freed_memory()
    run_dir, programs = runs.folder(run_dir), keep_compiled_programs()
    main = jax.process_index() == 0
    trainer = check(experiment, run_dir)
    experiment, earlier = trainer.experiment, resume.find(run_dir)
    saved = earlier.step
    agreement.check_experiment(experiment, run_dir, saved, source)
    trainer.check_validation()
    # Errors are raised before anything is written.
    begins_at, params = (None, None) if saved else starting.find(trainer, run_dir)
    with contextlib.ExitStack() as stack:
        data = guards.Guarded(trainer.loader("train"), experiment.guard)
        stack.callback(data.data.close)
        first, state = None, None

        def begin():
            """The state before the first step, probed, or a restored run's state. Takes the lock."""
            nonlocal first, state
            if not saved:
                state, first = trainer.init_state(params), next(data)
                refuse_leaks(trainer, state["params"], first, source)
            if main:
                stack.enter_context(run_lock.held(run_dir))
                if Checkpoints(run_dir).steps() != earlier.steps:
                    raise UserError(f"another process has trained {run_dir} in the meantime; start again.")

        run = runs.prepare(run_dir, experiment, saved, source, before_writing=begin)
        digest = run.environment["data_digest"]
        if saved:
            state, saved = earlier.restore(trainer.stored_state(), data, digest)
            state = trainer.with_guard(state, data.statistics)
            if main:
                earlier.checkpoints.put_aside()
        checkpoints = Checkpoints(run.directory, experiment.checkpoint)
        stack.callback(checkpoints.close)  # waits for the save in progress
        if main and begins_at is not None:
            write_atomically(run.directory / starting.BEGINS_AT, json.dumps({"step": begins_at}) + "\n")
        for warning in experiment.data.warnings() if main else ():
            _warn(warning)
        if main and programs:
            print(f"compiled programs are kept in {programs}", file=sys.stderr)
        if main and saved:
            print(f"resuming {run.directory} at step {saved}", file=sys.stderr)
        if saved >= experiment.steps:
            return Result(run.directory, saved, True, {})
        settings = experiments.to_dict(experiment)
        writer = metrics.MetricsWriter(run.directory, experiment.log, resumed_at=saved, settings=settings, active=main)
        stack.callback(writer.close)
        tokens = experiment.batch_size * experiment.data.seq_len
        bar = metrics.Progress(saved, experiment.steps, tokens, clock, active=main and progress)
        stack.callback(bar.close)
        ours = run_lock.Mark(run.directory / "config.json") if main else None
        watchdog = Watchdog(experiment.guard.watchdog, run.directory / f"hung_{jax.process_index()}.txt")
        loop = Loop(trainer, checkpoints, writer, bar, clock, watchdog, saved, digest, ours)
        with jax.set_mesh(trainer.mesh), StopSignal() as stop, watchdog:
            step, state = loop.run(state, data, saved, stop, first)
            loop.save(step, state, data)
            checkpoints.wait()
    finished = step >= experiment.steps
    if main and not finished:
        print(f"stopped at step {step}; resume with: engrax train {run.directory}", file=sys.stderr)
    return Result(run.directory, step, finished, loop.latest, not finished and stop.number == signal.SIGINT)


def check(experiment: Experiment, run_dir: epath.Path) -> Trainer:
    """The trainer of the experiment, whose paths are absolute. Raises UserError for errors that can be found before
    data are read and arrays are created."""
    experiments.check_saveable(experiment)
    experiment = experiments.with_absolute_paths(experiment)
    runs.refuse_file(run_dir)
    refuse_links(run_dir)
    if jax.process_index() == 0:
        run_lock.refuse_other(run_dir)
        metrics.check_logs(experiment.log)
    trainer = Trainer(experiment)
    refuse_what_does_not_fit(trainer)  # its mesh raises if devices or batch do not divide
    return trainer


@dataclasses.dataclass
class Loop:
    """The parts that the loop uses, and its state between steps."""

    trainer: Trainer
    checkpoints: Checkpoints
    writer: metrics.MetricsWriter
    bar: metrics.Progress
    clock: metrics.Clock  # started with the command
    watchdog: Watchdog
    saved: int = 0  # the newest checkpoint's step
    data_digest: str | None = None  # of the training data
    ours: run_lock.Mark | None = None  # in the process that writes: the run folder's config.json
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    validated: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    _window: tuple[int, float] | None = None  # (step, seconds) of the last logged step, for tokens per second
    _state: Any = None
    _blocked: float | None = None  # seconds that a save blocked the loop, until they are logged
    _stops: bool = False

    def __post_init__(self):
        experiment = self.trainer.experiment
        self.flat = guards.FlatLoss(experiment)
        self.speed = Speed(experiment, resolve_dtype(experiment.compute_dtype))
        self.trace = Trace(experiment, self.checkpoints.directory.parent)

    def run(self, state: Any, data: guards.Guarded, start: int, stop: StopSignal, first: Any = None) -> tuple[int, Any]:
        """Runs until the last step or a signal; returns (steps done, state). `first`: a batch already taken from
        `data`."""
        self._state = state
        del state  # nothing but the loop holds it when it makes room for an earlier one
        while True:
            try:
                step = self._run(data, start, stop, first)
                break
            except guards.Rewind as error:
                bad = error.with_traceback(None)  # which would hold arrays
            start, first = self.rewind(bad, data), None
            if self._stops:
                step = start
                break
        self.watchdog.rest()
        self.trace.close()
        return step, self._state

    def _run(self, data: guards.Guarded, start: int, stop: StopSignal, first: Any) -> int:
        experiment = self.trainer.experiment
        pending, step = None, start
        for step in range(start + 1, experiment.steps + 1):
            batch = next(data) if first is None else first
            first = None
            self.trace.before(step)
            values = self._step(batch, drop=data.dropped(step) is not None)
            self.trace.after(step, values)
            if values:  # a step is compiled
                self.watchdog.alive()
            if pending is not None:
                self.log(*pending, data)
            pending = (step, values, self._seconds_if_done(values))
            saves = _due(step, experiment.checkpoint.every, experiment.steps)
            if saves or _due(step, experiment.eval.every, experiment.steps):
                jax.block_until_ready(values)  # this time is training; the code below waits for it anyway
                pending = (step, values, self.clock.seconds())
                with self._paused():
                    self.validate(step, self._state)
            if saves:  # save only after the step's metrics are checked and written; saving waits for the device anyway
                self.log(*pending, data)
                pending = None
                with self._paused():
                    self.save(step, self._state, data)
            self._stops = stop.reached(step)
            if self._stops:
                break
        if pending is not None:
            self.log(*pending, data)
        return step

    def _step(self, batch: Any, *, drop: bool) -> dict[str, jax.Array]:
        """Dispatches a step and returns its metrics; of a dropped batch there are none, and only the step counts."""
        if drop:
            self._state = self._state | {"step": self.trainer.advance(self._state["step"])}
            return {}
        batch = self.trainer.put(batch)
        with jax.transfer_guard("disallow"):  # an implicit transfer here would stall the device
            self._state, values = self.trainer.train_step(self._state, batch)
        return values

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        """What is neither timed nor watched."""
        with self.clock.paused(), self.watchdog.paused():
            yield

    def _seconds_if_done(self, values: dict[str, jax.Array]) -> float | None:
        """The time when a step ended, if it ended before its call returned (on the CPU); None while it runs."""
        return self.clock.seconds() if all(value.is_ready() for value in values.values()) else None

    def log(self, step: int, values: dict[str, jax.Array], ended: float | None, data: guards.Guarded) -> None:
        """Reads the metrics of a step, waits for it unless it `ended`, and writes them if this step is logged.

        Raises Diverged or `guards.Rewind` for a bad step.
        """
        experiment = self.trainer.experiment
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        if row:
            self.watchdog.alive()
        dropped = data.dropped(step) if not row else None
        verdict = "sound" if dropped else guards.verdict_of(row)
        now = self.clock.seconds() if ended is None else ended
        if self._window is None:
            row["seconds_to_first_step"] = now
            self._window = (step, now)
        self.latest |= row
        if verdict != "sound":
            dropped = data.pass_bad(step, row, verdict, self.saved)
        row |= dropped or {}
        skipped = data.skipped(step)
        self.bar.update(step, {k: row[k] for k in ("loss",) if k in row} | ({"skipped": skipped} if skipped else {}))
        if warning := self.flat.seen(step, row.get("loss")):
            _warn(warning)
        validated = self.validated.get(step, {})
        if step % experiment.log.every == 0 or step in (1, experiment.steps) or validated or dropped:
            before, then = self._window
            if step > before:
                rate = (step - before) * experiment.batch_size * experiment.data.seq_len / (now - then)
                row |= {"tokens_per_second": rate} | self.speed(rate)
                self._window = (step, now)
            if self._blocked is not None:
                row["save_blocked_seconds"], self._blocked = self._blocked, None
            self._check_ours(step)
            self.writer.write(step, row | validated)

    def rewind(self, bad: guards.Rewind, data: guards.Guarded) -> int:
        """Goes back to the newest checkpoint from before the dropped batches and returns its step.

        Raises Diverged if there is none.
        """
        self.watchdog.rest()
        self._check_ours(bad.step)
        self._state = None  # makes room on the device
        self.checkpoints.wait(last=False)
        for back in [step for step in self.checkpoints.steps()[::-1] if step < bad.first]:
            try:
                like = self.trainer.stored_state()
                state = resume.restore(self.checkpoints, like, data, self.data_digest, back)
                break
            except Damaged as error:
                _warn(f"checkpoint {back} is damaged ({error.reason}); the one before is tried")
        else:
            raise Diverged(
                f"{bad.told}, and no checkpoint from before step {bad.first} is left to go back to; save more often "
                "(--checkpoint.every, --checkpoint.keep-last), or resume with --guard.action skip."
            )
        _warn(f"{bad.told}; back to step {back}, without the batches of steps {bad.first} to {bad.step}")
        self.checkpoints.delete_after(back)  # they have learnt from dropped batches
        self._state = self.trainer.with_guard(state, data.statistics)
        self.writer.go_back(back)
        self.saved, self._window = back, (back, self.clock.seconds())
        return back

    def _check_ours(self, step: int) -> None:
        """Raises UserError if the run folder is gone or another's."""
        if self.ours is not None:
            self.ours.check(step)

    def validate(self, step: int, state: Any) -> None:
        """Validation loss and memory diagnostics after `step`."""
        params = self.trainer.evaluated(state)
        values = self.trainer.validate(params, self.trainer.experiment.eval.batches)
        self.validated = {step: values | self.trainer.diagnose(params)}  # logged with the step's loss
        self.latest |= values
        self.bar.update(step, {"val": values["validation_loss"]})

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves the state after `step`, once."""
        if step != self.saved and step > 0:
            self._check_ours(step)
            loss = {k: v for k, v in self.validated.get(step, {}).items() if k == "validation_loss"}
            data.statistics = jax.device_get(state["guard"]) if "guard" in state else None
            stored, began = {name: part for name, part in state.items() if name != "guard"}, time.monotonic()
            self.checkpoints.save(step, stored, resume.position(data, self.data_digest), loss or None)
            self.saved, self._blocked = step, time.monotonic() - began


@functools.cache
def _warn(sentence: str) -> None:
    """Prints a warning once, in one process, even if it trains several times."""
    if jax.process_index() == 0:
        print(f"warning: {sentence}", file=sys.stderr)


def _due(step: int, every: int, last: int) -> bool:
    return bool(every and step % every == 0) or step == last
