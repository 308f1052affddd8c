"""Times several updates of Hopfield retrieval on this machine's first device, against the same updates one by one.

    python benchmarks/hopfield_retrieval.py --output benchmarks/results/hopfield_retrieval.json

Four programs at each shape: `hopfield_retrieval(steps=k)`; the unfused loop, k calls of a compiled
`jax.nn.dot_product_attention` each of which the next one gets; the same k attentions compiled together; and the matrix
products of k updates alone, without softmax, below which no form of them can get. They take turns, so that whatever
else the machine does falls on all; ratios are of neighbouring runs, of time on the clock and of processor time, which
other work disturbs less. float32, forward.
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


@partial(jax.jit, static_argnums=2)
def products(state, stored, times):
    """The matrix products of that many updates, of numbers that stay finite."""
    state, stored = (jnp.swapaxes(x, 1, 2) for x in (state, stored))
    for _ in range(times):
        weights = jnp.einsum("bhnd,bhmd->bhnm", state, stored / stored.shape[2], precision="highest")
        state = jnp.einsum("bhnm,bhmd->bhnd", weights, stored, precision="highest")
    return jnp.swapaxes(state, 1, 2)


def programs(steps):
    def one_by_one(state, stored):
        for _ in range(steps):
            state = attention(state, stored, 1)
        return state

    def fused(state, stored):
        return hopfield_retrieval(state, stored, beta=state.shape[-1] ** -0.5, steps=steps)

    together, alone = (partial(function, times=steps) for function in (attention, products))
    return {"fused": fused, "unfused loop": one_by_one, "attentions together": together, "products alone": alone}


def measure(shape, steps, runs, seed):
    """Returns the milliseconds of every program, and how many times the fused one's the others take.

    Processor time has ticks, so a turn is as many calls as take some milliseconds.
    """
    batch, states, patterns, heads, width = shape
    keys = jax.random.split(jax.random.key(seed))
    arrays = [jax.random.normal(key, (batch, n, heads, width)) for key, n in zip(keys, (states, patterns))]
    calls = 1 + 2**21 // (batch * heads * states * patterns)
    clocks = {"ms": time.perf_counter, "processor_ms": time.process_time}
    run = programs(steps)
    times = {kind: {name: [] for name in run} for kind in clocks}
    results = {}
    for turn in range(runs + 2):
        for name, program in run.items():
            begin = [clock() for clock in clocks.values()]
            for _ in range(calls):
                results[name] = jax.block_until_ready(program(*arrays))
            for kind, clock, start in zip(clocks, clocks.values(), begin):
                if turn >= 2:
                    times[kind][name].append((clock() - start) * 1e3 / calls)
    attentions = [results[name] for name in ("unfused loop", "attentions together")]
    row = {"largest_difference": max(float(jnp.max(jnp.abs(x - results["fused"]))) for x in attentions)}
    for kind, found in times.items():
        row[kind] = {name: quantiles(t) for name, t in found.items()}
        row[kind.replace("ms", "ratios")] = {
            f"{name} / fused": quantiles([b / a for a, b in zip(found["fused"], found[name])])
            for name in run
            if name != "fused"
        }
    return row


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
            ratios = [row[kind]["unfused loop / fused"]["median"] for kind in ("ratios", "processor_ratios")]
            print(f"{name}, {steps} updates: {ms}; unfused / fused {ratios[0]:.2f}, in processor time {ratios[1]:.2f}")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
