"""Checks every kernel on one GPU, then times operations and training steps there.

    python benchmarks/on_gpu.py [--minutes 12] [--output benchmarks/results/on_gpu.json]

Three parts, in this order: the errors of every kernel against the float64 reference, beside those of the XLA form; the
times of the kernels, the XLA form and the peers that are installed (`engrax bench`) at published sizes
(flash-linear-attention's and FlashQLA's tables); 20 training steps of three configs. The file is written after every
row. No row begins after MINUTES. A kernel that errs more than 1.5 times as much as the XLA form is marked, and the
script ends with exit code 1.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.bench import bench
from engrax.pallas_kernels.dispatch import implementations

SLACK = 1.5  # times the error of the XLA form that a kernel may have
TRAINED = ("gated_deltanet_340m", "mom_340m", "quickstart_gpu")
ROWS, STEPS = 8, 20  # of a training


def checked_cases() -> list[bench.Case]:
    """Small sizes, one or more for every kernel."""
    rows = dict(batch=1, seq=256, heads=2, chunk_size=64)
    found = [
        bench.Case(op, rows | dict(key=key, value=value, gate=gate))
        for op in ("linear_attention", "gated_delta_rule")
        for gate in ("none", "scalar", "channel")
        for key, value in ((64, 64), (128, 128), (128, 256))
    ]
    for key, hidden, depth in ((64, 64, 1), (128, 128, 1), (64, 64, 2), (64, 128, 2)):
        found.append(bench.Case("neural_memory", rows | dict(key=key, value=key, hidden=hidden, depth=depth)))
    sizes = dict(batch=1, seq=256, patterns=256, heads=2, key=64, value=64, steps=3)
    return [*found, bench.Case("hopfield_retrieval", sizes)]


def timed_cases() -> list[bench.Case]:
    """The sizes of the peers' tables: 32 heads of 128 in one row of 2K to 32K tokens; 8 rows of 2K, heads of 256."""
    rows = [dict(batch=1, seq=n, heads=32, key=128, value=128) for n in (2048, 8192, 32768)]
    rows += [
        dict(batch=4, seq=4096, heads=64, key=128, value=128),
        dict(batch=8, seq=2048, heads=6, key=128, value=256),
    ]
    gates = {"gated_delta_rule": ("scalar", "channel"), "linear_attention": ("scalar",)}
    found = [bench.Case(op, row | dict(gate=gate, chunk_size=64)) for op in gates for gate in gates[op] for row in rows]
    memory = dict(batch=8, seq=4096, heads=16, key=64, value=64, chunk_size=64)
    found += [bench.Case("neural_memory", memory | dict(hidden=64 * depth, depth=depth)) for depth in (1, 2)]
    return [*found, *bench.default_cases("hopfield_retrieval", "gpu")]


def errors(case: bench.Case, kernel: str) -> dict[str, Any]:
    """A kernel's errors and the XLA form's, and whether they are within `SLACK`."""
    row = {"op": case.op, "sizes": case.sizes, "implementation": kernel}
    try:
        own, other = (bench.errors(case, name, jnp.bfloat16) for name in (kernel, "xla"))
    except NotImplementedError as error:
        return row | {"unsupported": str(error)}
    sound = all(own[part] <= SLACK * other[part] for part in own)
    return row | {"error": own, "error_of_xla": other, "sound": sound}


def training(name: str) -> dict[str, Any]:
    """Seconds per step and tokens per second of one device over the last half of `STEPS` steps, and the losses."""
    import engrax
    from engrax import configs
    from engrax.data import StdlibText
    from engrax.train import CheckpointConfig, EvalConfig, LogConfig

    shipped = configs.find(name).experiment
    experiment = dataclasses.replace(
        shipped,
        data=StdlibText(seq_len=shipped.data.seq_len),
        batch_size=ROWS,
        steps=STEPS,
        compute_dtype="bfloat16",
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=0, batches=1),
        log=LogConfig(every=1),
    )
    with tempfile.TemporaryDirectory() as folder:
        engrax.train(experiment, f"{folder}/run", progress=False)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "tokens_per_second" in line]
    speed = statistics.median(line["tokens_per_second"] for line in lines[STEPS // 2 :])
    tokens = ROWS * shipped.data.seq_len
    losses = [line["loss"] for line in lines]
    return {"config": name, "rows": ROWS, "tokens_per_second": speed, "step_seconds": tokens / speed, "losses": losses}


def parts(platform: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """(part, a call that returns its rows) in order."""
    for case in checked_cases():
        for found in implementations(case.op):
            if found.platform == platform:
                yield "errors", lambda case=case, name=found.name: [errors(case, name)]
    for case in timed_cases():
        yield "times", lambda case=case: list(bench.bench([case.op], cases=[case], dtype="bfloat16", runs=5))
    for name in TRAINED:
        yield "training", lambda name=name: [training(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--output", default="benchmarks/results/on_gpu.json")
    options = parser.parse_args()
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    start, found = time.monotonic(), {"errors": [], "times": [], "training": []}
    for part, run in parts(platform):
        if time.monotonic() - start > 60 * options.minutes:
            break
        try:
            rows = run()
        except Exception as error:  # one failing row must not cost the others
            rows = [{"failed": f"{type(error).__name__}: {error}"}]
        found[part] += rows
        print(part, *(json.dumps(row) for row in rows), sep="\n  ", flush=True)
        report = bench.report([]) | {"command": "python benchmarks/on_gpu.py"} | found
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    return int(any(not row.get("sound", "unsupported" in row) for row in found["errors"]))


if __name__ == "__main__":
    raise SystemExit(main())
