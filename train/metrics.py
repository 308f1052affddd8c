"""Where a run's numbers go: metrics.jsonl, a progress bar, and wandb and TensorBoard when asked."""

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
    """Writes one JSON object per logged step. Only process 0 writes; the others' writers do nothing."""

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
        """Appends one step's numbers everywhere, the line in one write."""
        if not self.active:
            return
        line = json.dumps({"step": step} | {k: _plain(v) for k, v in values.items()})
        if self._remote:  # buckets know no appending
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
        """Flushes and closes what was opened."""
        if self.active and self._wandb:
            self._wandb.finish()
        if self.active and self._tensorboard:
            self._tensorboard.close()


def _plain(value: Any) -> Any:
    """A number JSON can carry: NaN and infinities as strings."""
    value = value.item() if hasattr(value, "item") else value
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def cut_after(path: epath.Path, step: int) -> None:
    """Drops lines of steps beyond `step`, and a torn last line: what a killed run had written past its checkpoint."""
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
    """The logged steps of a run, oldest first; a torn last line is passed over."""
    rows = []
    path = epath.Path(run_dir) / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _start_wandb(run_dir: epath.Path, config: LogConfig, settings: dict) -> Any:
    """One wandb run for the whole life of the run folder: its id is kept in wandb_id.txt."""
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
    """Seconds of training since it was built. It stands still during evaluations and saves (kauldron's habit)."""

    def __init__(self):
        self._origin = time.perf_counter()
        self._stopped: float | None = None  # when the pause under way began

    def seconds(self) -> float:
        """Seconds so far without the pauses."""
        return (time.perf_counter() if self._stopped is None else self._stopped) - self._origin

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that the block takes."""
        self._stopped = time.perf_counter()
        try:
            yield
        finally:
            self._origin += time.perf_counter() - self._stopped
            self._stopped = None


class Progress:
    """A progress bar with loss, tokens per second and the time left; plain lines where the output is no terminal.

    Tokens per second follow `clock`, which leaves out evaluations and saves; the time left includes them.
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
        """Shows that `step` is done. The rate leaves out the first step, which compiles."""
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
        """Leaves the bar as it stands."""
        self.bar.close()
