"""Logging of a run: metrics.jsonl, a progress bar, and optionally wandb and TensorBoard."""

import contextlib
import json
import math
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from engrax.train.experiment import LogConfig


class MetricsWriter:
    """Writes one JSON object per logged step. Only process 0 writes; other processes do nothing."""

    def __init__(self, run_dir: epath.Path, config: LogConfig, *, resumed_at: int, settings: dict, active: bool = True):
        self.path = run_dir / "metrics.jsonl"
        self.active = active
        self._wandb = self._tensorboard = None
        if not active:
            return
        cut_after(self.path, resumed_at)
        self._remote = "://" in str(self.path)
        self._text = self.path.read_text() if self._remote and self.path.exists() else ""
        if config.wandb != "off":
            self._wandb = _start_wandb(run_dir, config, settings)
        if config.tensorboard:
            self._tensorboard = _start_tensorboard(run_dir)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Appends the values of one step to every log; the JSON line is one write."""
        if not self.active:
            return
        line = json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()})
        if self._remote:  # buckets cannot append
            self._text += line + "\n"
            self.path.write_text(self._text)
        else:
            with self.path.open("a") as file:
                file.write(line + "\n")
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes the logs."""
        if self.active and self._wandb:
            self._wandb.finish()
        if self.active and self._tensorboard:
            self._tensorboard.close()


def _plain(value: Any) -> Any:
    """A number that JSON can represent: NaN and infinities become strings."""
    value = value.item() if hasattr(value, "item") else value
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def cut_after(path: epath.Path, step: int) -> None:
    """Drops lines of steps beyond `step` and an incomplete last line, written by a killed run after its checkpoint."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def read(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The logged steps of a run, oldest first; an incomplete last line is skipped."""
    rows = []
    path = epath.Path(run_dir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _start_wandb(run_dir: epath.Path, config: LogConfig, settings: dict) -> Any:
    """One wandb run per run folder; its id is stored in wandb_id.txt."""
    import wandb

    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    return wandb.init(
        project=config.wandb_project,
        id=id_file.read_text().strip(),
        resume="allow",
        mode=config.wandb,
        dir=None if "://" in str(run_dir) else str(run_dir),
        name=run_dir.name,
        config=settings,
    )


def _start_tensorboard(run_dir: epath.Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        from engrax.errors import UserError

        raise UserError("log.tensorboard needs the package tensorboardX; install engrax[tensorboard].") from None
    return SummaryWriter(str(run_dir / "tensorboard"))


class Clock:
    """Seconds of training since construction. It pauses during evaluations and saves, as in kauldron."""

    def __init__(self):
        self._origin = time.perf_counter()
        self._stopped: float | None = None  # start of the current pause

    def seconds(self) -> float:
        """Seconds so far, without pauses."""
        return (time.perf_counter() if self._stopped is None else self._stopped) - self._origin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time of the `with` block."""
        self._stopped = time.perf_counter()
        try:
            yield
        finally:
            self._origin += time.perf_counter() - self._stopped
            self._stopped = None


class Progress:
    """A progress bar with loss, tokens per second and time left; plain lines if the output is not a terminal.

    Tokens per second use `clock`, which excludes evaluations and saves; the time left includes them.
    """

    def __init__(self, start: int, steps: int, tokens_per_step: int, clock: Clock, active: bool = True):
        from tqdm import tqdm

        self.steps, self.tokens_per_step, self.clock = steps, tokens_per_step, clock
        self.shown: dict[str, str] = {}
        self._first: tuple[int, float, float] | None = None  # (step, training seconds, time) of the first update
        self._latest: dict[str, float] = {}
        self._plain = active and not sys.stderr.isatty()
        self._said = 0.0
        self.bar = tqdm(
            total=steps,
            initial=start,
            disable=not active or self._plain,
            unit="step",
            dynamic_ncols=True,
            file=sys.stderr,
        )

    def update(self, step: int, values: dict[str, float]) -> None:
        """Shows that `step` is done. The rate excludes the first step, which compiles."""
        now, seconds = time.perf_counter(), self.clock.seconds()
        if self._first is None:
            self._first = (step, seconds, now)
        first, seconds_then, then = self._first
        self._latest |= values
        rate = (step - first) * self.tokens_per_step / max(seconds - seconds_then, 1e-9)
        self.shown = {k: f"{v:.4g}" for k, v in self._latest.items()} | {"tokens/s": f"{rate:,.0f}"}
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix(self.shown, refresh=False)
        if self._plain and (now - self._said > 10 or step == self.steps):
            self._said = now
            left = (self.steps - step) * (now - then) / max(step - first, 1)
            told = "  ".join(f"{k} {v}" for k, v in self.shown.items())
            print(f"step {step}/{self.steps}  {told}  left {left:.0f} s", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Closes the bar and leaves it on the screen."""
        self.bar.close()
