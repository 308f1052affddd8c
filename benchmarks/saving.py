"""Times saving a checkpoint: how long the loop is blocked, and until the checkpoint is complete.

    python benchmarks/saving.py --baseline FOLDER [--megabytes 500] [--rounds 5] [--output FILE.json]

FOLDER holds another checkout named `engrax`, for example of the commit before checkpoints had digests. Both save the
same arrays in turns, a new process each round. In a process the first save is not counted: it starts threads and
compiles. Blocked is the time inside `Checkpoints.save`, total that until `Checkpoints.wait` returns. With digests, the
verification of a restore and the search for NaN alone are timed too.
"""

import argparse
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

SAVES = 4  # counted in a process


def measure(megabytes: int) -> dict[str, list[float]]:
    """Seconds of each save by the `engrax` that is imported."""
    import jax
    import jax.numpy as jnp

    from engrax.train.checkpoint import Checkpoints
    from engrax.train.experiment import CheckpointConfig

    names = [f"layer{i}" for i in range(megabytes // 4)]
    keys = jax.random.split(jax.random.key(0), len(names))
    state = {"params": {name: jax.random.normal(key, (1024, 1024)) for name, key in zip(names, keys)}}
    jax.block_until_ready(state)
    found: dict[str, list[float]] = {"blocked": [], "total": []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(folder, CheckpointConfig(keep_last=1, keep_best=0))
        for step in range(1, SAVES + 2):
            started = time.perf_counter()
            checkpoints.save(step, state, {"next_index": step}, None)
            blocked = time.perf_counter()
            checkpoints.wait()
            if step > 1:
                found["blocked"].append(blocked - started)
                found["total"].append(time.perf_counter() - started)
            state = jax.tree.map(lambda x: x + jnp.float32(1), state)
            jax.block_until_ready(state)
        checkpoints.close()
        reader = Checkpoints(folder)
        if hasattr(reader, "verify"):
            from engrax.train import saver

            started = time.perf_counter()
            reader.verify(SAVES + 1)
            found["verify"] = [time.perf_counter() - started]
            started = time.perf_counter()
            jax.block_until_ready(saver._find_nan({f"params.{name}": leaf for name, leaf in state["params"].items()}))
            found["find_nan"] = [time.perf_counter() - started]
    return found


def in_process(checkout: Path, megabytes: int) -> dict[str, list[float]]:
    """`measure` in a new process, with the `engrax` in `checkout`."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--measure", "--megabytes", str(megabytes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Runs the benchmark and prints a table, or writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="the folder of the other checkout")
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.megabytes)))
        return
    checkouts = {"digests": Path(__file__).resolve().parents[2]} | (
        {"baseline": args.baseline} if args.baseline else {}
    )
    seconds: dict[str, dict[str, list[float]]] = {}
    for _ in range(args.rounds):
        for name, checkout in checkouts.items():
            for what, values in in_process(checkout, args.megabytes).items():
                seconds.setdefault(name, {}).setdefault(what, []).extend(values)
    medians = {n: {what: statistics.median(v) for what, v in found.items()} for n, found in seconds.items()}
    ratios = {w: medians["digests"][w] / s for w, s in medians.get("baseline", {}).items()}
    result = {
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.platform()}, {os.cpu_count()} CPUs",
        "megabytes": args.megabytes,
        "median_seconds": medians,
        "ratio_to_baseline": ratios,
        "seconds": seconds,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "seconds"}, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
