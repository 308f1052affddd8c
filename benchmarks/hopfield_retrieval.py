"""Times several updates of Hopfield retrieval on this machine's first device, against the same updates one by one.

    python benchmarks/hopfield_retrieval.py --output benchmarks/results/hopfield_retrieval.json

Three programs at each shape: `hopfield_retrieval(steps=k)`; the unfused loop, k calls of a compiled
`jax.nn.dot_product_attention` each of which the next one gets; and the same k attentions compiled together. They take
turns, so that whatever else the machine does falls on all; ratios are of neighbouring runs. float32, forward.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels import hopfield_retrieval

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import quantiles, report_head  # noqa: E402

SHAPES = {  # batch, states, patterns, heads, width
    "1024 states, 1024 patterns": (1, 1024, 1024, 4, 64),
    "4096 states, 256 patterns": (1, 4096, 256, 4, 64),
    "8 rows of 128 states, 128 patterns": (8, 128, 128, 4, 32),
}
STEPS, TARGET = (1, 3, 8), 2.0


@partial(jax.jit, static_argnums=2)
def attention(state, stored, times):
    """That many updates as attention, compiled together."""
    for _ in range(times):
        state = jax.nn.dot_product_attention(state, stored, stored, scale=state.shape[-1] ** -0.5)
    return state


def programs(steps):
    def one_by_one(state, stored):
        for _ in range(steps):
            state = attention(state, stored, 1)
        return state

    def fused(state, stored):
        return hopfield_retrieval(state, stored, beta=state.shape[-1] ** -0.5, steps=steps)

    return {"fused": fused, "unfused loop": one_by_one, "attentions together": partial(attention, times=steps)}


def measure(shape, steps, runs, seed):
    """Returns the milliseconds of every program, and how many times the fused one's the others take."""
    batch, states, patterns, heads, width = shape
    keys = jax.random.split(jax.random.key(seed))
    arrays = [jax.random.normal(key, (batch, n, heads, width)) for key, n in zip(keys, (states, patterns))]
    times = {name: [] for name in programs(steps)}
    results = {}
    for turn in range(runs + 2):
        for name, program in programs(steps).items():
            begin = time.perf_counter()
            results[name] = jax.block_until_ready(program(*arrays))
            if turn >= 2:
                times[name].append((time.perf_counter() - begin) * 1e3)
    apart = max(float(jnp.max(jnp.abs(x - results["fused"]))) for x in results.values())
    ratios = {
        f"{name} / fused": quantiles([b / a for a, b in zip(times["fused"], times[name])])
        for name in times
        if name != "fused"
    }
    return {"ms": {name: quantiles(t) for name, t in times.items()}, "ratios": ratios, "largest_difference": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each program (default 15)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the figures as JSON to this file")
    args = parser.parse_args()
    args.peer_python = None
    report = report_head("hopfield_retrieval.py", args) | {"device": jax.devices()[0].device_kind, "target": TARGET}
    report["versions"] = {"jax": jax.__version__, "numpy": np.__version__}
    report["results"] = {}
    for name, shape in SHAPES.items():
        for steps in STEPS:
            row = measure(shape, steps, args.runs, args.seed)
            report["results"][f"{name}, {steps} updates"] = row
            ms = ", ".join(f"{program} {t['median']:.1f} ms" for program, t in row["ms"].items())
            ratio = row["ratios"]["unfused loop / fused"]
            print(f"{name}, {steps} updates: {ms}; unfused / fused {ratio['median']:.2f}", flush=True)
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
