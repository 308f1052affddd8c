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

BEGIN, END, FLOPS = "== case ", "== done ", "== FLOPs over the needed ones "
MOST_FLOPS = 1.15  # of a mixture's projections, forward and backward, over the needed ones


def linear_attention(key, value, query_heads, heads, gate, segments=0):
    """Returns the core's forward and backward pass as a function of arrays, and their shapes.

    segments: with a state each; 0: one state per row.
    """
    from engrax.pallas_kernels.common.decay import Decay
    from engrax.pallas_kernels.linear_attention import gpu
    from engrax.pallas_kernels.linear_attention.vjp import LinearInputs

    plan = kernel_plan(key)

    def run(q, k, v, hi, lo, state, out_bar, state_bar, ids):
        decay = None if gate == "no" else Decay(hi, lo)
        inputs = LinearInputs(q, k, v, decay, state, layout(ids, segments))
        return gpu.forward(plan, inputs)[0], gpu.backward(plan, inputs, (), (out_bar, state_bar))

    q, v, _, decay, state, ids = shapes(key, value, query_heads, heads, gate, segments)
    return run, (q, q, v, decay, decay, state, v, state, ids)


def gated_delta_rule(key, value, query_heads, heads, gate, segments=0):
    """The same for the gated delta rule."""
    from engrax.pallas_kernels.common.decay import Decay
    from engrax.pallas_kernels.gated_delta_rule import gpu
    from engrax.pallas_kernels.gated_delta_rule.vjp import DeltaInputs

    plan = kernel_plan(key)

    def run(q, k, v, beta, hi, lo, state, out_bar, state_bar, ids):
        decay = None if gate == "no" else Decay(hi, lo)
        inputs = DeltaInputs(q, k, v, beta, decay, state, layout(ids, segments))
        outputs, residuals = gpu.forward(plan, inputs)
        return outputs, gpu.backward(plan, inputs, residuals, (out_bar, state_bar))

    q, v, beta, decay, state, ids = shapes(key, value, query_heads, heads, gate, segments)
    return run, (q, q, v, beta, decay, decay, state, v, state, ids)


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


def grouped_matmul(features, outputs, owners, transposed):
    """The same for the kernel of the grouped product, or of the cotangent of its rows."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels.grouped_matmul import gpu
    from engrax.pallas_kernels.grouped_matmul.grouping import GroupedInputs

    def run(*arrays):
        return gpu.multiply(False, GroupedInputs(*arrays), transposed)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    x = array(8, 100, 64, outputs if transposed else features)
    return run, (x, array(owners, features, outputs), array(8, 100, dtype=jnp.int32))


def packed_neural_memory(activation, *sizes):
    """The same for rows with segments and a reset state. Both layouts of the chunks are compiled (see `gpu_scan`)."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels.neural_memory import gpu
    from engrax.pallas_kernels.neural_memory.gates import Coefficients
    from engrax.pallas_kernels.neural_memory.vjp import Blocks, ScanInputs, ScanPlan

    blocks, batch, heads, slots = lead = (4, 2, 2, 64)

    def run(table, tokens, weights, momentum, fresh, begun):
        def scan(table, tokens, weights, momentum):
            parts = Blocks(table, None, *tokens, fresh, begun), (weights, momentum, weights), (weights, momentum)
            return gpu.passes(ScanPlan(activation, 1, True, aligned=True), ScanInputs(*parts))

        outputs, pull = jax.vjp(scan, table, tokens, weights, momentum)
        return outputs, pull(outputs)

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    q, v = (array(*lead, features, dtype=jnp.bfloat16) for features in (sizes[0], sizes[-1]))
    columns, matrices = array(*lead, 2), tuple(array(batch, heads, *size) for size in itertools.pairwise(sizes))
    table = Coefficients(*[columns] * 3, array(*lead, slots), array(*lead[:3], 2), array(*lead))
    flags = [array(blocks, batch, *more, dtype=bool) for more in ((), (slots,))]
    return run, (table, (q, q, v), matrices, matrices, *flags)


def hopfield_retrieval(key, value, dtype, causal=False, window=None):
    """The same, forwards, for three updates of Hopfield retrieval, from as many patterns as the kernel takes."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels.hopfield_retrieval import gpu
    from engrax.pallas_kernels.hopfield_retrieval.types import (
        Reach,
        RetrievalForm,
        RetrievalInputs,
        RetrievalShapes,
        Sight,
    )

    batch, heads, states, dtype = 2, 2, 256, jnp.dtype(dtype)

    def fits(patterns):
        sizes = (batch, heads, states, patterns, key, value)
        return gpu.unsupported(RetrievalShapes(3, "softmax", "dot", *sizes, dtype)) is None

    patterns = max(filter(fits, range(64, 4096, 64)))
    arrays = [
        jax.ShapeDtypeStruct((batch, heads, *size), dtype)
        for size in ((states, key), (patterns, key), (patterns, value))
    ]
    beta, ids = jax.ShapeDtypeStruct((heads,), jnp.float32), jax.ShapeDtypeStruct((batch, states), jnp.int32)
    stored_ids, place = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, patterns), (states,)))
    form = RetrievalForm(3, 1e-4, 64, "softmax", 1.0, "dot", "unrolled", dtype, Reach(causal, window))

    def run(*arrays):
        return gpu.passes(form, RetrievalInputs(*arrays[:4], Sight(None, *arrays[4:])))

    return run, (*arrays, beta, ids, stored_ids, place)


def kernel_plan(key):
    from engrax.pallas_kernels.common.log_decay import LogDecayPlan

    return LogDecayPlan(64, key**-0.5)


def layout(ids, segments):
    from engrax.pallas_kernels.common.segments import aligned_layout

    return aligned_layout(ids, segments, 64) if segments else None


def shapes(key, value, query_heads, heads, gate, segments) -> tuple:
    """Returns the shapes of q or k, of v, of a number per token, of the decay, of a state and of the segment ids."""
    import jax
    import jax.numpy as jnp

    def tokens(heads, *features, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((2, 256, heads, *features), dtype)

    q, v = tokens(query_heads, key, dtype=jnp.bfloat16), tokens(heads, value, dtype=jnp.bfloat16)
    decay = tokens(heads, key) if gate == "channel" else tokens(heads)
    states = (2, segments) if segments else (2,)
    ids = jax.ShapeDtypeStruct((2, 256 - 63 * segments), jnp.int32)  # which are laid out in 256 slots
    return q, v, tokens(heads), decay, jax.ShapeDtypeStruct((*states, heads, key, value), jnp.float32), ids


def cases() -> dict:
    """Returns {name: (function that makes the program, its arguments)}: one for every kernel that can be chosen.

    The gated delta rule takes the same kernels without gates as with them.
    """
    from engrax.tests import mom_projection

    found = {}
    for make, gates in ((linear_attention, ("no", "scalar", "channel")), (gated_delta_rule, ("scalar", "channel"))):
        for key, value, gate, heads in itertools.product((64, 128), (64, 128), gates, (2, 4)):
            name = f"{make.__name__} K={key} V={value} {gate} gate, 2 query and {heads} value heads"
            found[name] = (make, (key, value, 2, heads, gate))
        for gate in gates:
            name = f"{make.__name__} K=128 V=256 {gate} gate, 2 query and 4 value heads"
            found[name] = (make, (128, 256, 2, 4, gate))
        for key, value, gate in ((64, 64, "scalar"), (128, 256, "scalar"), (128, 128, "channel")):
            name = f"{make.__name__} K={key} V={value} {gate} gate, states of 3 segments"
            found[name] = (make, (key, value, 2, 2, gate, 3))
    for gate in ("no", "scalar"):
        found[f"linear_attention K=153 V=65 {gate} gate"] = (linear_attention, (153, 65, 2, 2, gate))
        name = f"linear_attention K=192 V=192 {gate} gate, states of 3 segments"
        found[name] = (linear_attention, (192, 192, 2, 4, gate, 3))
    found["gated_delta_rule K=36 V=20 channel gate"] = (gated_delta_rule, (36, 20, 2, 2, "channel"))
    for key, value in itertools.product((64, 128), (64, 128)):
        found[f"neural_memory K={key} V={value} depth 1"] = (neural_memory, ("gelu", key, value))
        found[f"neural_memory K={key} V={value} depth 1, packed rows"] = (packed_neural_memory, ("gelu", key, value))
        for dtype in ("bfloat16", "float32") if key == 64 else ("bfloat16",):
            found[f"hopfield_retrieval D={key} V={value} {dtype}"] = (hopfield_retrieval, (key, value, dtype))
            if value == 128:
                name = f"hopfield_retrieval D={key} V={value} {dtype}, causal, window"
                found[name] = (hopfield_retrieval, (key, value, dtype, True, 200))
    for (features, outputs, owners), way in itertools.product(((1024, 2048, 5), (64, 192, 17)), ("", ", transposed")):
        name = f"grouped_matmul D={features} E={outputs} {owners} owners{way}"
        found[name] = (grouped_matmul, (features, outputs, owners, bool(way)))
    found["mom_340m projections"] = (mom_projection.projections, ())
    for activation, hidden in itertools.product(("gelu", "silu", "relu", "tanh"), (64, 128)):
        name = f"neural_memory K=64 V=64 depth 2, {hidden} hidden features, {activation}"
        found[name] = (neural_memory, (activation, 64, hidden, 64))
        found[f"{name}, packed rows"] = (packed_neural_memory, (activation, 64, hidden, 64))
    return found


def compile_all(only: str) -> None:
    """Compiles the cases whose name holds `only`, between marks on stdout, where ptxas reports too."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from engrax.pallas_kernels import devices, topologies
    from engrax.tests import mom_projection

    device = topologies.topology_devices(topologies.find("h200"), 1)
    one_device = NamedSharding(Mesh(np.asarray(device), ("x",)), PartitionSpec())
    for name, (make, arguments) in cases().items():
        if only in name:
            run, specs, *needed = make(*arguments)
            specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one_device), specs)
            print(f"{BEGIN}{name}", flush=True)
            start = time.perf_counter()
            with devices.use(devices.NAMED["h200"]):
                compiled = jax.jit(run).trace(*specs).lower(lowering_platforms=("cuda",)).compile()
            for flops in needed:
                print(f"{FLOPS}{mom_projection.gpu_flops(compiled.as_text()) / flops:.4f}", flush=True)
            print(f"{END}{time.perf_counter() - start:.2f}", flush=True)


def parse(report: str) -> dict:
    """Returns {case: {"seconds": ..., "kernels": {name: {"registers": ..., "spill_bytes": ...}}}}."""
    results, kernels, kernel = {}, {}, None
    for line in report.splitlines():
        if line.startswith(BEGIN):
            kernels = {}
            results[line.removeprefix(BEGIN)] = {"seconds": None, "kernels": kernels}
        elif line.startswith(FLOPS):
            results[list(results)[-1]]["flops_over_needed"] = float(line.removeprefix(FLOPS))
        elif line.startswith(END):
            results[list(results)[-1]]["seconds"] = float(line.removeprefix(END))
        elif entry := re.search(r"Compiling entry function '(\w+?)_mosaic_gpu_kernel' for '(\w+)'", line):
            kernel = kernels.setdefault(entry[1], {"target": entry[2]})
        elif spills := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            if kernel is not None:
                kernel["spill_bytes"] = max(kernel.get("spill_bytes", 0), int(spills[1]) + int(spills[2]))
        elif (registers := re.search(r"ptxas info\s*: Used (\d+) registers", line)) and kernel is not None:
            kernel["registers"] = int(registers[1])
            kernel = None  # what follows is another compiler's report on the same kernel
    return results


def complaints(results: dict) -> list[str]:
    """Returns what is wrong with the results, one sentence per kernel or case."""
    found = [f"{case}: was not compiled to the end" for case, result in results.items() if result["seconds"] is None]
    for case, result in results.items():
        if result.get("flops_over_needed", 1) > MOST_FLOPS:
            found.append(f"{case}: takes {result['flops_over_needed']} times the FLOPs that are needed")
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
