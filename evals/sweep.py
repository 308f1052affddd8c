"""The core of `engrax sweep`, `engrax compare` and `engrax frontier`: many trials in one folder.

    trials = [Trial(f"gla/lr_{rate:g}_seed_0", experiment, {"optimizer.learning_rate": rate}) for rate in rates]
    outcome = sweep.run(trials, "runs/mine", processes=2, minutes=60)
    outcome.scores["gla/lr_0.01_seed_0"].mean     # trials that ended; nan if the training diverged
    outcome.missing                               # the other trials' names, and why they are missing

Every trial is trained in its own run folder, FOLDER/NAME. A finished trial's score is read from its run folder, an
interrupted trial continues from its last checkpoint, and a trial that diverges or fails does not end the others.

- processes > 1: trials run in fresh processes (`engrax.evals.worker`), each with its share of the CPU's threads and of
  the devices. A process that dies loses its own trial alone. Ctrl-C ends all of them.
- minutes: no trial begins after that time, nor one that would end after it, judged by the trials that ended; those that
  have begun continue to their end. minutes=0 only reads what is there.
- Stages that depend on each other (a grid, then seeds at its best rate) are two calls; `later` is the number of trials
  of the calls to come, for the time left that is shown.
"""

import collections
import dataclasses
import json
import os
import select
import sys
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath

from engrax.errors import UserError
from engrax.evals import trials as one
from engrax.evals.processes import Worker, end, refuse_what_has_no_file, shares
from engrax.evals.trials import Score, Stopped, Trial
from engrax.files import refuse_links
from engrax.train import experiment as experiments
from engrax.train import loop, runs

__all__ = ["Outcome", "Score", "Trial", "run"]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a sweep."""

    scores: dict[str, Score]  # of the trials that ended, by name, in the order given
    missing: dict[str, str]  # why the others have none


def run(
    trials: Sequence[Trial],
    folder: epath.PathLike,
    *,
    processes: int = 1,
    minutes: float | None = None,
    progress: bool = True,
    later: int = 0,
) -> Outcome:
    """Trains and scores the trials that are missing in `folder`, at most `processes` at once.

    Raises UserError, before any training, if names or experiments do not fit or a run in the folder is another
    experiment; KeyboardInterrupt for Ctrl-C, after its processes have ended.
    """
    if processes > 1:  # this process runs nothing: a GPU's memory is for the others
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    folder = runs.folder(folder)
    runs.refuse_file(folder)
    refuse_links(folder)
    paths = [trial.path for trial in trials]
    if len(set(paths)) < len(paths):
        raise UserError(f"two trials have the name {max(paths, key=paths.count)!r}; give every trial its own.")
    account = _Account(trials, folder, processes, minutes, progress, later)
    check(account.waiting, folder)
    if processes == 1:
        _in_turn(account, folder)
    elif account.waiting:
        _at_once(account, folder, processes)
    return account.outcome()


def check(trials: Sequence[Trial], folder: epath.Path) -> None:
    """Raises UserError for what can be found before any training. Trials that differ in their learning rate and seed
    alone are tried once."""
    seen = set()
    for trial in trials:
        config = trial.config
        plain = dataclasses.replace(config.optimizer, learning_rate=1.0)
        alike = experiments.to_json(dataclasses.replace(config, seed=0, optimizer=plain))
        if alike not in seen:
            loop.check(config, folder / trial.path)
        seen.add(alike)


def _in_turn(account: "_Account", folder: epath.Path) -> None:
    """Runs the trials in this process."""
    while (trial := account.begin()) is not None:
        try:
            account.ended(trial, one.score(trial.config, folder / trial.path))
        except Stopped:
            raise
        except UserError as error:
            account.failed(trial, str(error))


def _at_once(account: "_Account", folder: epath.Path, processes: int) -> None:
    """Runs the trials in processes of their own."""
    refuse_what_has_no_file(account.waiting)
    free, idle, busy = shares(processes), [], []
    try:
        while True:
            while (free or idle) and (trial := account.begin()) is not None:
                busy.append(idle.pop() if idle else Worker(free.pop(0)))
                busy[-1].begin(trial, folder / trial.path)
            if not busy:
                return
            for worker in select.select(busy, [], [])[0]:
                trial, why = worker.trial, worker.failure()
                busy.remove(worker)
                if worker.alive:
                    idle.append(worker)
                else:
                    end([worker])
                    free.append(worker.share)
                if why is None:
                    account.ended(trial, one.read(trial.config, folder / trial.path))
                else:
                    account.failed(trial, why)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command continues from there.") from None
    finally:
        end([*busy, *idle])


class _Account:
    """What has ended, what is waiting, how long trials take, and what the budget allows."""

    def __init__(self, trials, folder, processes: int, minutes: float | None, progress: bool, later: int):
        _refuse_senseless(processes, minutes)
        self.trials, self.processes, self.later = trials, processes, later
        self.say: Callable[[str], None] = _say if progress else lambda line: None
        self.started, self.minutes = time.monotonic(), minutes
        self.scores: dict[str, Score] = {}
        self.missing: dict[str, str] = {}
        self.late: list[str] = []  # the missing ones that the budget does not allow
        self._models: dict[str, str] = {}  # by trial: its model's fields as text, made once
        self._took, self._known = collections.Counter(), collections.Counter()  # by model, None = all: seconds, trials
        self.open: list[Trial] = list(trials)  # waiting or running
        self.waiting: list[Trial] = []
        for trial in trials:
            found = one.read(trial.config, folder / trial.path)
            if found is None:
                self.waiting.append(trial)
            else:
                self.ended(trial, found)

    def begin(self) -> Trial | None:
        """The next trial that the budget allows; None if there is none. Trials that it does not allow are missing."""
        if self.minutes is None:
            return self.waiting.pop(0) if self.waiting else None
        left = 60 * self.minutes - (time.monotonic() - self.started)
        for trial in [trial for trial in self.waiting if self.seconds(trial) >= left]:
            self.waiting.remove(trial)
            self.open.remove(trial)
            self.late.append(trial.name)
            self.missing[trial.name] = f"it would have ended after the {self.minutes:.3g} minutes"
        return self.waiting.pop(0) if self.waiting else None

    def seconds(self, trial: Trial) -> float:
        """The time that a trial is expected to take: the mean of those with its model, else of all; 0 if unknown."""
        model = self._model(trial)
        return self._mean(model if self._known[model] else None)

    def _mean(self, model: str | None) -> float:
        return self._took[model] / max(self._known[model], 1)

    def _model(self, trial: Trial) -> str:
        if trial.name not in self._models:
            self._models[trial.name] = json.dumps(experiments.to_dict(trial.config.model))
        return self._models[trial.name]

    def ended(self, trial: Trial, score: Score) -> None:
        """Takes down a score and says it."""
        self.scores[trial.name] = score
        self.open.remove(trial)
        for model in (self._model(trial), None):
            self._took[model] += score.seconds
            self._known[model] += 1
        result = "diverged" if score.sums is None else f"{score.mean:.4f}"
        self.say(f"{self._count()} {trial.name}: {result} ({self._left():.0f} min left)")

    def failed(self, trial: Trial, why: str) -> None:
        """Takes down why a trial has no score and says it."""
        self.missing[trial.name] = why
        self.open.remove(trial)
        self.say(f"{self._count()} {trial.name} has no score: {why}")

    def outcome(self) -> Outcome:
        """The result; says what is missing for lack of time."""
        if self.late:
            shown = ", ".join(self.late[:4]) + (f" and {len(self.late) - 4} more" if len(self.late) > 4 else "")
            self.say(
                f"the {self.minutes:.3g} minutes are over: {len(self.late)} of {len(self.trials)} trials are missing "
                f"({shown}); the same command continues."
            )
        order = [trial.name for trial in self.trials]
        return Outcome(
            {name: self.scores[name] for name in order if name in self.scores},
            {name: self.missing[name] for name in order if name in self.missing},
        )

    def _count(self) -> str:
        return f"[{len(self.trials) - len(self.open)}/{len(self.trials)}]"

    def _left(self) -> float:
        """Minutes until all trials have ended, those of later calls too."""
        return (sum(map(self.seconds, self.open)) + self.later * self._mean(None)) / self.processes / 60


def _refuse_senseless(processes: int, minutes: float | None) -> None:
    if processes < 1 or (minutes is not None and not minutes >= 0):
        raise UserError(f"processes={processes} must be at least 1, and minutes={minutes} must not be negative.")
    if processes > 1 and jax.process_count() > 1:
        raise UserError("processes > 1 does not work where JAX itself runs in several processes; leave it out.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
