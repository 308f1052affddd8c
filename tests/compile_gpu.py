"""Compiles every GPU kernel for an H200 on a machine without one, and fails where a register is spilled.

    make test-compile
    python tests/compile_gpu.py --output benchmarks/results/compile_gpu.json     in an environment with jax[cuda13]

XLA compiles ahead of time for a described device (`pallas_kernels/topologies.py`); ptxas, told to report, says what
each kernel takes. The programs are compiled in a process of their own, whose output is read. Runs in about eight
minutes on two cores.
"""

import argparse
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

BEGIN, END = "== case ", "== done "


def linear_attention(key, value, query_heads, heads, gate):
    """Returns the core's forward and backward pass as a function of arrays, and their shapes."""
    from engrax.pallas_kernels.common.decay import Decay
    from engrax.pallas_kernels.linear_attention import gpu
    from engrax.pallas_kernels.linear_attention.vjp import LinearInputs

    plan = kernel_plan(key)

    def run(q, k, v, hi, lo, state, out_bar, state_bar):
        inputs = LinearInputs(q, k, v, None if gate == "no" else Decay(hi, lo), state, None)
        return gpu.forward(plan, inputs)[0], gpu.backward(plan, inputs, (), (out_bar, state_bar))

    q, v, _, decay, state = shapes(key, value, query_heads, heads, gate)
    return run, (q, q, v, decay, decay, state, v, state)


def gated_delta_rule(key, value, query_heads, heads, gate):
    """The same for the gated delta rule."""
    from engrax.pallas_kernels.common.decay import Decay
    from engrax.pallas_kernels.gated_delta_rule import gpu
    from engrax.pallas_kernels.gated_delta_rule.vjp import DeltaInputs

    plan = kernel_plan(key)

    def run(q, k, v, beta, hi, lo, state, out_bar, state_bar):
        inputs = DeltaInputs(q, k, v, beta, None if gate == "no" else Decay(hi, lo), state, None)
        outputs, residuals = gpu.forward(plan, inputs)
        return outputs, gpu.backward(plan, inputs, residuals, (out_bar, state_bar))

    q, v, beta, decay, state = shapes(key, value, query_heads, heads, gate)
    return run, (q, q, v, beta, decay, decay, state, v, state)


def neural_memory(activation, *sizes):
    """The same for the neural memory with layers of these sizes: blocks of bfloat16 tokens and the coefficients of the
    dual form."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels.neural_memory import gpu
    from engrax.pallas_kernels.neural_memory.gates import Coefficients
    from engrax.pallas_kernels.neural_memory.vjp import Blocks, ScanInputs, ScanPlan

    blocks, batch, heads, slots = lead = (4, 2, 2, 64)

    def run(q, k, v, a, b, write, last_momentum, last_write, out_bar, *matrices):
        def scan(*arrays):
            table, tokens, state = Coefficients(None, *arrays[:5]), arrays[5:8], arrays[8:]
            weights, momentum = state[: len(sizes) - 1], state[len(sizes) - 1 :]
            plan, blocks = ScanPlan(activation, 1, True), Blocks(table, None, *tokens, None, None)
            return gpu.passes(plan, ScanInputs(blocks, (weights, momentum, weights), None))

        outputs, pull = jax.vjp(scan, a, b, write, last_momentum, last_write, q, k, v, *matrices)
        return outputs, pull((out_bar, outputs[1]))

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, v = (array(*lead, features, dtype=jnp.bfloat16) for features in (sizes[0], sizes[-1]))
    columns, matrices = array(*lead, 1), [array(batch, heads, *size) for size in itertools.pairwise(sizes)]
    coefficients = (columns, columns, array(*lead, slots), array(*lead[:3], 1), array(*lead))
    return run, (q, q, v, *coefficients, v, *matrices, *matrices)


def hopfield_retrieval(key, value, dtype):
    """The same, forwards, for three updates of Hopfield retrieval, from as many patterns as the kernel takes."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels.hopfield_retrieval import gpu
    from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm, RetrievalInputs, RetrievalShapes

    batch, heads, states, dtype = 2, 2, 256, jnp.dtype(dtype)

    def fits(patterns):
        sizes = (batch, heads, states, patterns, key, value)
        return gpu.unsupported(RetrievalShapes(3, "softmax", "dot", *sizes, dtype, False)) is None

    patterns = max(filter(fits, range(64, 4096, 64)))
    arrays = [
        jax.ShapeDtypeStruct((batch, heads, *size), dtype)
        for size in ((states, key), (patterns, key), (patterns, value))
    ]
    beta, visible = jax.ShapeDtypeStruct((heads,), jnp.float32), jax.ShapeDtypeStruct((batch, 1, patterns), bool)
    form = RetrievalForm(3, 1e-4, 64, "softmax", 1.0, "dot", "unrolled", dtype)
    return lambda *arrays: gpu.passes(form, RetrievalInputs(*arrays)), (*arrays, beta, visible)


def kernel_plan(key):
    from engrax.pallas_kernels.common.log_decay import LogDecayPlan

    return LogDecayPlan(64, key**-0.5)


def shapes(key, value, query_heads, heads, gate) -> tuple:
    """Returns the shapes of q or k, of v, of a number per token, of the decay and of a state."""
    import jax
    import jax.numpy as jnp

    def tokens(heads, *features, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((2, 256, heads, *features), dtype)

    q, v = tokens(query_heads, key, dtype=jnp.bfloat16), tokens(heads, value, dtype=jnp.bfloat16)
    decay = tokens(heads, key) if gate == "channel" else tokens(heads)
    return q, v, tokens(heads), decay, jax.ShapeDtypeStruct((2, heads, key, value), jnp.float32)


def cases() -> dict:
    """Returns {name: (function that makes the program, its arguments)}: one for every kernel that can be chosen.

    The gated delta rule takes the same kernels without gates as with them.
    """
    found = {}
    for make, gates in ((linear_attention, ("no", "scalar", "channel")), (gated_delta_rule, ("scalar", "channel"))):
        for key, value, gate, heads in itertools.product((64, 128), (64, 128), gates, (2, 4)):
            name = f"{make.__name__} K={key} V={value} {gate} gate, 2 query and {heads} value heads"
            found[name] = (make, (key, value, 2, heads, gate))
    for key, value in itertools.product((64, 128), (64, 128)):
        found[f"neural_memory K={key} V={value} depth 1"] = (neural_memory, ("gelu", key, value))
        for dtype in ("bfloat16", "float32") if key == 64 else ("bfloat16",):
            found[f"hopfield_retrieval D={key} V={value} {dtype}"] = (hopfield_retrieval, (key, value, dtype))
    for activation, hidden in itertools.product(("gelu", "silu", "relu", "tanh"), (64, 128)):
        name = f"neural_memory K=64 V=64 depth 2, {hidden} hidden features, {activation}"
        found[name] = (neural_memory, (activation, 64, hidden, 64))
    return found


def compile_all(only: str) -> None:
    """Compiles the cases whose name holds `only`, between marks on stdout, where ptxas reports too."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from engrax.pallas_kernels import topologies

    device = topologies.topology_devices(topologies.find("h200"), 1)
    one_device = NamedSharding(Mesh(np.asarray(device), ("x",)), PartitionSpec())
    for name, (make, arguments) in cases().items():
        if only in name:
            run, specs = make(*arguments)
            specs = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device) for x in specs]
            print(f"{BEGIN}{name}", flush=True)
            start = time.perf_counter()
            jax.jit(run).trace(*specs).lower(lowering_platforms=("cuda",)).compile()
            print(f"{END}{time.perf_counter() - start:.2f}", flush=True)


def parse(report: str) -> dict:
    """Returns {case: {"seconds": ..., "kernels": {name: {"registers": ..., "spill_bytes": ...}}}}."""
    results, kernels, kernel = {}, {}, None
    for line in report.splitlines():
        if line.startswith(BEGIN):
            kernels = {}
            results[line.removeprefix(BEGIN)] = {"seconds": None, "kernels": kernels}
        elif line.startswith(END):
            results[list(results)[-1]]["seconds"] = float(line.removeprefix(END))
        elif entry := re.search(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel' for '(\w+)'", line):
            kernel = kernels.setdefault(entry[1], {"target": entry[2]})
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernel is not None:
                kernel["spill_bytes"] = int(spills[1]) + int(spills[2])
        elif (registers := re.search(r"ptxas info\s*: Used (\d+) registers", line)) and kernel is not None:
            kernel["registers"] = int(registers[1])
            kernel = None  # what follows is another compiler's report on the same kernel
    return results


def complaints(results: dict) -> list[str]:
    """Returns what is wrong with the results, one sentence per kernel or case."""
    found = [f"{case}: was not compiled to the end" for case, result in results.items() if result["seconds"] is None]
    for case, result in results.items():
        if not result["kernels"]:
            found.append(f"{case}: ptxas reported no kernel")
        for name, kernel in result["kernels"].items():
            if kernel.get("spill_bytes") != 0:
                found.append(f"{case}: {name} spills {kernel.get('spill_bytes')} bytes of registers")
            if kernel["target"] != "sm_90a":
                found.append(f"{case}: {name} was compiled for {kernel['target']}")
    return found


def versions() -> dict:
    from importlib.metadata import distributions

    wanted = ("jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    found = {d.metadata["Name"].lower(): d.version for d in distributions()}
    return {name: found.get(name) for name in wanted} | {"python": ".".join(map(str, sys.version_info[:3]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return compile_all(options.only)
    if tuple(map(int, versions()["jax"].split(".")[:3])) < (0, 11, 2):
        sys.exit(f"kernels need jax >= 0.11.2 (Python >= 3.12), this is {versions()['jax']}")
    from engrax.pallas_kernels import topologies

    environment = {
        **os.environ,
        **topologies.ENVIRONMENT,
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # a program from the cache is not compiled, and not reported
    }
    command = [sys.executable, __file__, "--child", "--only", options.only]
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    report = child.stdout.decode(errors="replace")
    results = parse(report)
    for case, result in results.items():
        kernels = (f"{name} {kernel.get('registers')}" for name, kernel in result["kernels"].items())
        print(f"{case}: registers {', '.join(kernels)}")
    wrong = complaints(results)
    if child.returncode or not results:
        sys.exit(f"{report[-4000:]}\nThe compiling process ended with code {child.returncode}.")
    if wrong:
        sys.exit("\n".join(wrong))
    if options.output:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "make test-compile",
            "device": "NVIDIA H200 (sm_90a), described; nothing was run",
            "versions": versions(),
            "results": results,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    count = sum(len(result["kernels"]) for result in results.values())
    print(f"{count} kernels in {len(results)} programs compile for sm_90a without spills.")


if __name__ == "__main__":
    main()
