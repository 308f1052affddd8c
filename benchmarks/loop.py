"""Times what the training loop adds: from the command to the first step, and per step beside the bare compiled step.

    python benchmarks/loop.py [--config quickstart] [--steps 4] [--trials 30] [--output FILE.json]

The first figures are wall-clock times from starting `engrax train CONFIG` in a new process to its first logged step,
imports included: with nothing compiled before, and started again with the programs that the first start has kept (3
starts each). The last compares seconds per step of the
loop (data, metrics, logging every step) with the compiled step alone on one resident batch: inside one run they take
turns, STEPS steps each, TRIALS times. The overhead is the median of the ratios of neighbours, its interval a bootstrap.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to_first_step(config: str, cache: str) -> float:
    """Wall-clock seconds from the start of the command to its first line in metrics.jsonl; cache: `$ENGRAX_CACHE`."""
    with tempfile.TemporaryDirectory() as folder:
        log, begun = Path(folder) / "run" / "metrics.jsonl", time.perf_counter()
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        environment["ENGRAX_CACHE"] = cache
        command = [
            sys.executable,
            "-m",
            "engrax.cli",
            "train",
            config,
            "--run-dir",
            str(log.parent),
            "--log.every",
            "1",
        ]
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (log.exists() and log.stat().st_size) and process.poll() is None:
            time.sleep(0.01)
        seconds = time.perf_counter() - begun
        process.kill()
        process.wait()
    return seconds


def first_and_second_starts(config: str, rounds: int = 3) -> tuple[list[float], list[float]]:
    """Seconds to the first step with an empty cache of programs, and started again."""
    first, second = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            first.append(seconds_to_first_step(config, cache))
            second.append(seconds_to_first_step(config, cache))
    return first, second


class Turns:
    """A compiled step that takes turns: `block` steps as the loop asks for them, then as many on one batch."""

    def __init__(self, step, block: int):
        self.step, self.block = step, block
        self.calls, self.begun = 0, None
        self.looped, self.bare = [], []  # seconds per step, one number a block

    def __call__(self, state, batch):
        import jax

        if self.calls % self.block == 0:
            jax.block_until_ready(state)
            now = time.perf_counter()
            if self.calls > self.block:  # the first block compiles
                self.looped.append((now - self.begun) / self.block)
            begun = time.perf_counter()
            for _ in range(self.block):
                state, values = self.step(state, batch)
            jax.block_until_ready((state, values))
            self.begun = time.perf_counter()
            if self.calls:
                self.bare.append((self.begun - begun) / self.block)
        self.calls += 1
        return self.step(state, batch)


def step_seconds(config: str, block: int, trials: int) -> tuple[list[float], list[float]]:
    """(seconds per step of the loop, of the bare compiled step): one pair per trial, of `block` steps each."""
    from unittest import mock

    from engrax.configs import find
    from engrax.train import CheckpointConfig, EvalConfig, LogConfig, loop
    from engrax.train.trainer import Trainer

    experiment = dataclasses.replace(
        find(config).experiment,
        steps=(trials + 2) * block + 1,
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=0, batches=1),
        log=LogConfig(every=1),
    )
    made = []

    class Alternating(Trainer):
        @functools.cached_property
        def train_step(self):
            made.append(Turns(Trainer.train_step.func(self), block))
            return made[-1]

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "Trainer", Alternating):
        loop.train(experiment, Path(folder) / "run", progress=False)
    (turns,) = made
    return turns.looped[:trials], turns.bare[:trials]


def median_interval(values: list[float]) -> tuple[float, float]:
    """The bootstrap 95 % interval of the median."""
    import numpy as np

    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--output")
    args = parser.parse_args()
    first, second = first_and_second_starts(args.config)
    looped, bare = step_seconds(args.config, args.steps, args.trials)
    overhead = [a / b - 1 for a, b in zip(looped, bare)]
    for name, seconds in (("command to first step", first), ("started again", second)):
        low, high = min(seconds), max(seconds)
        print(f"{name:22} {statistics.median(seconds):6.2f} s  (min {low:.2f}, max {high:.2f})")
    print(f"step in the loop       {statistics.median(looped):6.3f} s, bare {statistics.median(bare):.3f} s")
    low, high = median_interval(overhead)
    print(f"overhead               {statistics.median(overhead):+6.1%}  (95 % interval {low:+.1%} to {high:+.1%})")
    if args.output:
        import jax

        found = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/loop.py " + " ".join(sys.argv[1:]),
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0]}",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "seconds_to_first_step": first,
            "seconds_to_first_step_again": second,
            "step_seconds_loop": looped,
            "step_seconds_bare": bare,
            "overhead": {"median": statistics.median(overhead), "low": low, "high": high, "ratios": overhead},
        }
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
