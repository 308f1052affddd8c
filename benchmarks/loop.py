"""Times what the training loop adds: from the command to the first step, and per step beside the bare compiled step.

    python benchmarks/loop.py [--config quickstart] [--steps 20] [--trials 3] [--output FILE.json]

The first figure is wall-clock time from starting `engrax train CONFIG` in a new process to its first logged step,
imports and compilation included, without a compilation cache. The second compares seconds per step of the loop (data,
metrics, progress, logging every step) with the compiled step alone on one resident batch, taking turns.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds_to_first_step(config: str) -> float:
    """Wall-clock seconds from the start of the command to its first line in metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        log, begun = Path(folder) / "run" / "metrics.jsonl", time.perf_counter()
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
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


def step_seconds(config: str, steps: int, trials: int) -> tuple[list[float], list[float]]:
    """(seconds per step of the loop, of the bare compiled step), one pair per trial."""
    import jax

    from engrax.configs import find
    from engrax.train import CheckpointConfig, EvalConfig, LogConfig, loop, metrics
    from engrax.train.trainer import Trainer

    experiment = dataclasses.replace(
        find(config).experiment,
        steps=steps,
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=0, batches=1),
        log=LogConfig(every=1),
    )
    trainer, looped, bare = Trainer(experiment), [], []
    batch, state = trainer.put(next(trainer.loader("train"))), trainer.init_state()
    state, values = trainer.train_step(state, batch)
    for _ in range(trials):
        with tempfile.TemporaryDirectory() as folder:
            loop.train(experiment, Path(folder) / "run", progress=False)
            rows = [r for r in metrics.read(Path(folder) / "run") if "tokens_per_second" in r][
                :-1
            ]  # the last validates
        tokens = experiment.batch_size * experiment.data.seq_len
        looped.append(statistics.fmean(tokens / row["tokens_per_second"] for row in rows))
        jax.block_until_ready(values)
        begun = time.perf_counter()
        for _ in range(len(rows)):
            state, values = trainer.train_step(state, batch)
        jax.block_until_ready(values)
        bare.append((time.perf_counter() - begun) / len(rows))
    return looped, bare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--output")
    args = parser.parse_args()
    first = [seconds_to_first_step(args.config) for _ in range(args.trials)]
    looped, bare = step_seconds(args.config, args.steps, args.trials)
    overhead = [a / b - 1 for a, b in zip(looped, bare)]
    print(f"command to first step  {statistics.median(first):6.2f} s  (min {min(first):.2f}, max {max(first):.2f})")
    print(f"step in the loop       {statistics.median(looped):6.3f} s, bare {statistics.median(bare):.3f} s")
    spread = f"(min {min(overhead):+.1%}, max {max(overhead):+.1%})"
    print(f"overhead               {statistics.median(overhead):+6.1%}  {spread}")
    if args.output:
        import jax

        found = {
            "date": datetime.date.today().isoformat(),
            "command": "python benchmarks/loop.py " + " ".join(sys.argv[1:]),
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {jax.devices()[0]}",
            "versions": {"jax": jax.__version__, "python": platform.python_version()},
            "seconds_to_first_step": first,
            "step_seconds_loop": looped,
            "step_seconds_bare": bare,
            "overhead": overhead,
        }
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
