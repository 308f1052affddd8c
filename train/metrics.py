"""Logging of a run: metrics.jsonl, a progress bar, and optionally wandb and TensorBoard."""

import contextlib
import json
import math
import netrc
import os
import secrets
import sys
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from engrax.errors import UserError
from engrax.files import is_full, read_text, short, write_atomically
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
        self._waiting: list[str] = []  # lines for which the disk had no room
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
            self._append(line + "\n")
        if self._wandb:
            self._wandb.log(values, step=step)
        if self._tensorboard:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def go_back(self, step: int) -> None:
        """Drops the lines of steps beyond `step`, which will be trained again."""
        if self.active:
            cut_after(self.path, step)
            self._text = self.path.read_text() if self._remote and self.path.exists() else ""

    def _append(self, line: str) -> None:
        """Appends a line. While the disk is full, lines wait for a later call and no part of a line is left."""
        self._waiting.append(line)
        size = os.path.getsize(self.path) if self.path.exists() else 0
        try:
            with self.path.open("a") as file:
                file.write("".join(self._waiting))
            self._waiting.clear()
        except OSError as error:
            if not is_full(error):
                raise
            if size:
                os.truncate(self.path, size)
            if len(self._waiting) == 1:
                print(f"the disk is full: {self.path} continues when there is room", file=sys.stderr)

    def close(self) -> None:
        """Flushes and closes the logs."""
        if self.active and self._waiting:
            print(f"the disk is full: {self.path} lacks the last {len(self._waiting)} logged steps", file=sys.stderr)
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
    if path.exists():
        write_atomically(path, "".join(line + "\n" for line, row in _rows(path) if row["step"] <= step))


def read(run_dir: epath.PathLike) -> list[dict[str, Any]]:
    """The logged steps of a run, oldest first. An incomplete last line is skipped; other bad lines raise UserError."""
    path = epath.Path(run_dir) / "metrics.jsonl"
    return [row for _, row in _rows(path)] if path.exists() else []


def _rows(path: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(line, its object) for every logged step."""
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        sensible = isinstance(row, dict) and type(row.get("step")) is int and all(map(_is_number, row.values()))
        if sensible:
            yield line, row
        elif number < len(lines):  # the last line may be torn
            raise UserError(f"{path}, line {number} is no logged step ({short(line)}); remove the line.")


def _is_number(value: Any) -> bool:
    """Whether `_plain` could have written the value."""
    if isinstance(value, int):
        return abs(value) < 1 << 63
    return isinstance(value, float) or value in ("nan", "inf", "-inf")


def check_logs(config: LogConfig) -> None:
    """Raises UserError if a log cannot be opened: the package is missing, or wandb has no key for online mode."""
    if config.tensorboard:
        _summary_writer()
    if config.wandb == "online" and not _has_wandb_key():
        raise UserError(
            "log.wandb=online needs an API key of Weights & Biases: run `wandb login`, set WANDB_API_KEY, or choose "
            "--log.wandb offline."
        )


def _has_wandb_key() -> bool:
    """Whether wandb finds a key without a prompt: in its environment variables, or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("://")[-1].split("/")[0]
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start_wandb(run_dir: epath.Path, config: LogConfig, settings: dict) -> Any:
    """One wandb run per run folder; its id is stored in wandb_id.txt."""
    import wandb

    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        write_atomically(id_file, secrets.token_hex(8))
    name = read_text(id_file).strip()
    if not name.isalnum():
        raise UserError(f"{id_file} holds no id of a wandb run ({short(name)}); delete it to begin a new one.")
    try:
        return wandb.init(
            project=config.wandb_project,
            id=name,
            resume="allow",
            mode=config.wandb,
            dir=None if "://" in str(run_dir) else str(run_dir),
            name=run_dir.name,
            config=settings,
        )
    except Exception as error:  # wandb raises many types: no network, a refused key, a bad project
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"wandb does not start ({reason}); choose --log.wandb offline, or off.") from error


def _start_tensorboard(run_dir: epath.Path) -> Any:
    return _summary_writer()(str(run_dir / "tensorboard"))


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UserError("log.tensorboard needs the package tensorboardX; install engrax[tensorboard].") from None
    return SummaryWriter


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
