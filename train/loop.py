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
"""

import contextlib
import dataclasses
import functools
import json
import math
import signal
import sys
from typing import Any

import jax
from etils import epath

from engrax.errors import Diverged, UserError
from engrax.files import expect, read_json, refuse_links, short, write_atomically
from engrax.train import agreement, metrics, run_lock, runs
from engrax.train import experiment as experiments
from engrax.train.checkpoint import Checkpoints, first_line
from engrax.train.distributed import StopSignal
from engrax.train.experiment import Experiment
from engrax.train.fit import refuse_what_does_not_fit
from engrax.train.host import keep_compiled_programs, keep_freed_memory
from engrax.train.probe import refuse_leaks
from engrax.train.trainer import Trainer

BEGINS_AT = "start_from.json"  # in a run folder: the starting step in the earlier run


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
    experiment, saved = trainer.experiment, _latest_step(run_dir)
    agreement.check_experiment(experiment, run_dir, saved, source)
    trainer.check_validation()
    # Errors are raised before anything is written.
    begins_at, params = (None, None) if saved else _earlier_params(trainer, run_dir)
    with contextlib.ExitStack() as stack:
        data = trainer.loader("train")
        stack.callback(data.close)
        first, state = None, None

        def begin():
            """The state before the first step, probed, or a restored run's state. Takes the lock."""
            nonlocal first, state
            if not saved:
                state, first = trainer.init_state(params), next(data)
                refuse_leaks(trainer, state["params"], first, source)
            if main:
                stack.enter_context(run_lock.held(run_dir))
            if _latest_step(run_dir) != saved:  # in all processes: Orbax has barriers here
                raise UserError(f"another process has trained {run_dir} in the meantime; start again.")

        run = runs.prepare(run_dir, experiment, saved, source, before_writing=begin)
        checkpoints = Checkpoints(run.directory, experiment.checkpoint)
        stack.callback(checkpoints.close)  # waits for the save in progress
        if main and begins_at is not None:
            write_atomically(run.directory / BEGINS_AT, json.dumps({"step": begins_at}) + "\n")
        if saved:
            state = _restore(trainer, checkpoints, data, saved)
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
        loop = Loop(trainer, checkpoints, writer, bar, clock, saved=saved)
        with jax.set_mesh(trainer.mesh), StopSignal() as stop:
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
    latest: dict[str, float] = dataclasses.field(default_factory=dict)
    validated: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    saved: int = 0
    _window: tuple[int, float] | None = None  # (step, seconds) of the last logged step, for tokens per second

    def run(self, state: Any, data: Any, start: int, stop: StopSignal, first: Any = None) -> tuple[int, Any]:
        """Runs until the last step or a signal; returns (steps done, state). `first`: a batch already taken from
        `data`."""
        experiment = self.trainer.experiment
        pending, step = None, start
        for step in range(start + 1, experiment.steps + 1):
            batch = self.trainer.put(next(data) if first is None else first)
            first = None
            with jax.transfer_guard("disallow"):  # an implicit transfer here would stall the device
                state, values = self.trainer.train_step(state, batch)
            if pending is not None:
                self.log(*pending)
            pending = (step, values, self._seconds_if_done(values))
            saves = _due(step, experiment.checkpoint.every, experiment.steps)
            if saves or _due(step, experiment.eval.every, experiment.steps):
                jax.block_until_ready(values)  # this time is training; the code below waits for it anyway
                pending = (step, values, self.clock.seconds())
                with self.clock.paused():
                    self.validate(step, state)
            if saves:  # save only after the step's metrics are checked and written; saving waits for the device anyway
                self.log(*pending)
                pending = None
                with self.clock.paused():
                    self.save(step, state, data)
            if stop.reached(step):
                break
        if pending is not None:
            self.log(*pending)
        return step, state

    def _seconds_if_done(self, values: dict[str, jax.Array]) -> float | None:
        """The time when a step ended, if it ended before its call returned (on the CPU); None while it runs."""
        return self.clock.seconds() if all(value.is_ready() for value in values.values()) else None

    def log(self, step: int, values: dict[str, jax.Array], ended: float | None) -> None:
        """Reads the metrics of a step, waits for it unless it `ended`, and writes them if this step is logged."""
        experiment = self.trainer.experiment
        row = {name: float(value) for name, value in jax.device_get(values).items()}
        now = self.clock.seconds() if ended is None else ended
        if self._window is None:
            row["seconds_to_first_step"] = now
            self._window = (step, now)
        self.latest |= row
        self.bar.update(step, {"loss": row["loss"]})
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            kept = f"the checkpoint of step {self.saved} is sound" if self.saved else "nothing was saved yet"
            raise Diverged(
                f"the loss or the gradient of step {step} is not finite; {kept}. "
                "Start again in another --run-dir with a lower --optimizer.learning-rate."
            )
        validated = self.validated.get(step, {})
        if step % experiment.log.every == 0 or step in (1, experiment.steps) or validated:
            before, then = self._window
            if step > before:
                row["tokens_per_second"] = (
                    (step - before) * experiment.batch_size * experiment.data.seq_len / (now - then)
                )
                self._window = (step, now)
            self.writer.write(step, row | validated)

    def validate(self, step: int, state: Any) -> None:
        """Validation loss and memory diagnostics after `step`."""
        values = self.trainer.validate(state["params"], self.trainer.experiment.eval.batches)
        self.validated = {step: values | self.trainer.diagnose(state["params"])}  # logged with the step's loss
        self.latest |= values
        self.bar.update(step, {"val": values["validation_loss"]})

    def save(self, step: int, state: Any, data: Any) -> None:
        """Saves the state after `step`, once."""
        if step != self.saved and step > 0:
            loss = {k: v for k, v in self.validated.get(step, {}).items() if k == "validation_loss"}
            self.checkpoints.save(step, state, data.get_state(), loss or None)
            self.saved = step


@functools.cache
def _warn(sentence: str) -> None:
    """Prints a warning, once per process, even if it trains several times."""
    print(f"warning: {sentence}", file=sys.stderr)


def _due(step: int, every: int, last: int) -> bool:
    return bool(every and step % every == 0) or step == last


def _latest_step(run_dir: epath.Path) -> int:
    """The newest checkpoint's step, 0 without a checkpoint."""
    if not (run_dir / "checkpoints").exists():
        return 0
    checkpoints = Checkpoints(run_dir)
    steps = checkpoints.steps()
    checkpoints.close()
    return steps[-1] if steps else 0


def _restore(trainer: Trainer, checkpoints: Checkpoints, data: Any, saved: int) -> Any:
    """The state of the newest checkpoint. Moves the data to its position."""
    state, position = checkpoints.restore(trainer.abstract_state(), saved)
    try:
        _refuse_senseless(position)
        data.set_state(position)
    except Exception as error:
        raise UserError(
            f"the position in the data of checkpoint {saved} in {checkpoints.directory} makes no sense "
            f"({first_line(error)}); delete that checkpoint to go on from an earlier one."
        ) from error
    return state


def _refuse_senseless(position: Any) -> None:
    """Raises ValueError if a number in a data position is not a valid count."""
    if isinstance(position, (dict, list)):
        for part in position.values() if isinstance(position, dict) else position:
            _refuse_senseless(part)
    elif isinstance(position, (int, float)) and not 0 <= position < 1 << 53:
        raise ValueError(f"{short(position)} is no position")


def _earlier_params(trainer: Trainer, run_dir: epath.Path) -> tuple[int | None, Any]:
    """(step, parameters) of the run `start_from`: the newest, or those this run already started from if it stopped
    before its first checkpoint. (None, None) without `start_from`."""
    given = trainer.experiment.start_from
    if given is None:
        return None, None
    if trainer.experiment.init_from is not None:
        raise UserError("init_from and start_from both say what the parameters start from; choose one.")
    directory = runs.folder(given)
    if not (directory / "checkpoints").exists():
        raise UserError(f"start_from={given} holds no checkpoints; give the folder of a run that was trained.")
    begun = run_dir / BEGINS_AT
    refuse_links(directory)
    at = expect(read_json(begun).get("step"), int, f"{begun}: step") if begun.exists() else None
    earlier = Checkpoints(directory)
    try:
        step = earlier.resolve(at)
        return step, earlier.restore_params(trainer.abstract_state()["params"], step)
    except UserError as error:
        hint = f" This run started from it ({begun}); start again in another --run-dir." if begun.exists() else ""
        raise UserError(f"start_from={given}: {error}{hint}") from None
    finally:
        earlier.close()
