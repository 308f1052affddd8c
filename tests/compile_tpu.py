"""Compiles every TPU kernel, forward and backward, for v5e and v6e on a machine without a TPU.

    make test-compile
    python tests/compile_tpu.py --output benchmarks/results/compile_tpu.json     in an environment with jax[tpu]

libtpu compiles ahead of time for a described topology. What each kernel takes of VMEM is read from the compiled
program. Runs in a few minutes.
"""

import argparse
import datetime
import json
import re
import sys
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp

from engrax.pallas_kernels import topologies
from engrax.pallas_kernels.common.decay import Decay
from engrax.pallas_kernels.common.log_decay import LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.common.segments import aligned_layout
from engrax.pallas_kernels.devices import NAMED, use
from engrax.pallas_kernels.dispatch import implementation
from engrax.pallas_kernels.gated_delta_rule.vjp import DeltaInputs
from engrax.pallas_kernels.grouped_matmul.grouping import GroupedInputs, GroupedShapes
from engrax.pallas_kernels.hopfield_retrieval import tpu as hopfield_retrieval
from engrax.pallas_kernels.hopfield_retrieval import types as hopfield_types
from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
from engrax.pallas_kernels.neural_memory import tpu as neural_memory
from engrax.pallas_kernels.neural_memory import vjp as neural_memory_vjp
from engrax.pallas_kernels.neural_memory.gates import Coefficients
from engrax.pallas_kernels.neural_memory.types import MemoryShapes
from engrax.pallas_kernels.softmax_attention import splash
from engrax.pallas_kernels.softmax_attention import types as attention_types
from engrax.tests import mom_projection

TARGETS = ("v5e", "v6e")
BATCH, CHUNKS, HEADS = 8, 32, 4  # enough that the arrays do not lie in VMEM as wholes
OPERATIONS = "linear_attention|gated_delta_rule|neural_memory|hopfield_retrieval"
KERNEL = re.compile(rf"%\w*?((?:{OPERATIONS})_(?:forward|backward_states|backward)|splash_mha_(?:fwd|dq|dkv))")
MOST_FLOPS = 1.15  # of a mixture's projections, forward and backward, over the needed ones
SCOPED = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"0","size":"(\d+)"')


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def log_decay(op, key, value, gate, dtype, query_heads=HEADS, chunk=64, segments=False):
    """Returns the core's forward and backward pass as a function of arrays, and their shapes."""
    length, kernel = CHUNKS * chunk, implementation(op, "pallas_tpu")
    shapes = LogDecayShapes(BATCH, length, query_heads, HEADS, key, value, chunk, jnp.dtype(dtype), gate, segments)
    assert kernel.supports(shapes) is None, kernel.supports(shapes)
    plan = LogDecayPlan(chunk, key**-0.5)
    q, v = array(BATCH, length, query_heads, key, dtype=dtype), array(BATCH, length, HEADS, value, dtype=dtype)
    per_token = array(BATCH, length, HEADS)
    g = {"none": None, "scalar": per_token, "channel": array(*per_token.shape, key)}[gate]
    decay = None if g is None else Decay(g, g)
    layout, state = None, array(BATCH, HEADS, key, value)
    if segments:
        ids = array(BATCH, length - 3 * (chunk - 1), dtype=jnp.int32)
        layout = jax.eval_shape(lambda ids: aligned_layout(ids, 3, chunk), ids)
        state = array(BATCH, 3, HEADS, key, value)
    if op == "linear_attention":
        inputs = LinearInputs(q, q, v, decay, state, layout)
    else:
        inputs = DeltaInputs(q, q, v, per_token, decay, state, layout)

    def run(inputs, out_bar, state_bar):
        outputs, residuals = kernel.passes.forward(plan, inputs)
        return outputs, kernel.passes.backward(plan, inputs, residuals, (out_bar, state_bar))

    return run, (inputs, v, state)


def memory(layers, activation="gelu", slots=64, group=1, phased=False, segments=False, decayed=False):
    """Returns the scan over blocks with its derivative as a function of arrays, and their shapes."""
    float32 = jnp.dtype(jnp.float32)
    sizes = dict(layers=layers, slots=slots, group=group, batch=BATCH, heads=HEADS, blocks=CHUNKS)
    shapes = MemoryShapes(dtype=float32, tokens=float32, aligned=not phased, segments=segments, **sizes)
    assert neural_memory.unsupported(shapes) is None, neural_memory.unsupported(shapes)
    plan = neural_memory_vjp.ScanPlan(activation, group, False)
    lead, bases = (CHUNKS, BATCH, HEADS), 2 if segments else 1
    columns, square = array(*lead, slots, bases), array(*lead, slots, slots)
    anchor = columns if segments or decayed else None
    table = Coefficients(anchor, columns, columns, square, array(*lead, bases), array(*lead, slots))
    flags = array(CHUNKS, BATCH, dtype=bool)
    rows = [array(*lead, slots, size) for size in (layers[0][0], layers[0][0], layers[-1][1])]
    begun = array(CHUNKS, BATCH, slots, dtype=bool) if segments else None
    blocks = neural_memory_vjp.Blocks(table, square, *rows, flags if phased else None, begun)
    matrices = tuple(array(BATCH, HEADS, *layer) for layer in layers)

    def run(blocks, carry, reset):
        def scan(floats, carry, reset):
            inputs = neural_memory_vjp.ScanInputs(blocks._replace(**floats), carry, reset)
            return neural_memory.passes(plan, inputs)

        floats = {name: getattr(blocks, name) for name in ("coefficients", "first_scores", "q", "k", "v")}
        outputs, pull = jax.vjp(scan, floats, carry, reset)
        return outputs, pull(outputs)

    return run, (blocks, (matrices,) * 3, (matrices,) * 2 if segments else None)


def grouped(rows, owners, features, outputs, dtype):
    """Returns the grouped product with its derivative as a function of arrays, and their shapes."""
    kernel, blocks = implementation("grouped_matmul", "pallas_tpu"), 100
    shapes = GroupedShapes(BATCH, blocks, rows, owners, features, outputs, jnp.dtype(dtype))
    assert kernel.supports(shapes) is None, kernel.supports(shapes)

    def run(x, kernels, owner, bar):
        outputs, pull = jax.vjp(lambda *arrays: kernel.passes(False, GroupedInputs(*arrays, owner)), x, kernels)
        return outputs, pull(bar)

    x, bar = (array(BATCH, blocks, rows, size, dtype=dtype) for size in (features, outputs))
    return run, (x, array(owners, features, outputs, dtype=dtype), array(BATCH, blocks, dtype=jnp.int32), bar)


def hopfield(states, patterns, key, value, steps, dtype, causal=False, window=None):
    """Returns several updates of Hopfield retrieval as a function of arrays, and their shapes."""
    dtype = jnp.dtype(dtype)
    shapes = hopfield_types.RetrievalShapes(steps, "softmax", "dot", BATCH, HEADS, states, patterns, key, value, dtype)
    assert hopfield_retrieval.unsupported(shapes) is None, hopfield_retrieval.unsupported(shapes)
    reach = hopfield_types.Reach(causal, window)
    form = hopfield_types.RetrievalForm(steps, 1e-4, 64, "softmax", 1.0, "dot", "unrolled", dtype, reach)
    sizes = (states, key), (patterns, key), (patterns, value)
    arrays = [array(BATCH, HEADS, *size, dtype=dtype) for size in sizes]
    ids = [array(*shape, dtype=jnp.int32) for shape in ((BATCH, states), (BATCH, patterns), (states,))]

    def run(*arrays):
        sight = hopfield_types.Sight(None, *arrays[4:])
        return hopfield_retrieval.passes(form, hopfield_types.RetrievalInputs(*arrays[:4], sight))

    return run, (*arrays, array(HEADS), *ids)


def attention(key, window, segments, length=4096, heads=16, groups=4):
    """Returns splash attention with its derivative as a function of arrays, and their shapes."""
    dtype = jnp.dtype(jnp.bfloat16)
    shapes = attention_types.AttentionShapes(BATCH, length, heads, groups, key, window, dtype, segments, False)
    assert splash.unsupported(shapes) is None, splash.unsupported(shapes)
    form = attention_types.AttentionForm(window, key**-0.5)
    q, k = (array(BATCH, length, count, key, dtype=dtype) for count in (heads, groups))
    ids = array(BATCH, length, dtype=jnp.int32) if segments else None

    def run(inputs, out_bar):
        outputs, residuals = splash.passes.forward(form, inputs)
        return outputs, splash.passes.backward(form, inputs, residuals, (out_bar,))

    return run, (attention_types.AttentionInputs(q, k, k, ids), q)


def cases() -> dict:
    """Returns {name: (function that makes the program, its arguments by name)}."""
    found = {}
    for op in ("linear_attention", "gated_delta_rule"):
        for gate in ("none", "scalar", "channel"):
            for dtype in ("bfloat16", "float32"):
                sizes = dict(op=op, key=128, value=128, gate=gate, dtype=dtype)
                found[f"{op} K=V=128, gate {gate}, {dtype}"] = log_decay, sizes
            more = dict(op=op, key=64, value=128, gate=gate, dtype="bfloat16", query_heads=2, segments=True)
            found[f"{op} K=64 V=128, gate {gate}, bfloat16, grouped heads, states of segments"] = log_decay, more
        odd = dict(op=op, key=36, value=20, gate="channel", dtype="bfloat16", chunk=48)
        found[f"{op} K=36 V=20, chunk 48, gate channel, bfloat16"] = log_decay, odd
        large = dict(op=op, key=256, value=512, gate="scalar", dtype="bfloat16", chunk=128)
        found[f"{op} K=256 V=512, chunk 128, gate scalar, bfloat16"] = log_decay, large
    one, two = ((128, 128),), ((64, 256), (256, 64))
    found["neural_memory 128-128"] = memory, dict(layers=one)
    found["neural_memory 128-128, rows at phases, segments"] = memory, dict(layers=one, phased=True, segments=True)
    found["neural_memory 64-256-64"] = memory, dict(layers=two)
    everything = dict(layers=two, slots=16, group=4, phased=True, segments=True)
    for activation in ("gelu", "silu", "relu", "tanh"):
        name = f"neural_memory 64-256-64, {activation}, chunk 16, groups of 4, rows at phases, segments"
        found[name] = memory, everything | dict(activation=activation)
    found["neural_memory 128-512-128, rows at phases, segments"] = (
        memory,
        dict(layers=((128, 512), (512, 128)), phased=True, segments=True),
    )
    found["neural_memory 20-36-12, chunk 5, decayed anchor"] = (
        memory,
        dict(layers=((20, 36), (36, 12)), slots=5, phased=True, decayed=True),
    )
    for dtype in ("bfloat16", "float32"):
        for rows, owners, features, outputs in ((64, 5, 1024, 2048), (64, 5, 1024, 4), (16, 17, 2560, 100)):
            sizes = dict(rows=rows, owners=owners, features=features, outputs=outputs, dtype=dtype)
            found[f"grouped_matmul D={features} E={outputs} {owners} owners, {dtype}"] = grouped, sizes
    found["mom_340m projections"] = mom_projection.projections, {}
    for dtype in ("bfloat16", "float32"):
        for steps in (2, 3, 8):
            sizes = dict(states=4096, patterns=1024, key=64, value=64, steps=steps, dtype=dtype)
            found[f"hopfield_retrieval N=4096 M=1024 D=V=64, {steps} updates, {dtype}"] = hopfield, sizes
        sizes = dict(states=1024, patterns=1024, key=64, value=64, steps=8, dtype=dtype, causal=True, window=300)
        found[f"hopfield_retrieval N=M=1024 D=V=64, 8 updates, {dtype}, causal, window"] = hopfield, sizes
    for key, window, segments in ((64, 1024, True), (128, None, True), (32, None, False)):
        name = f"softmax_attention K={key}, window {window}{', segments' if segments else ''}"
        found[name] = attention, dict(key=key, window=window, segments=segments)
    found["softmax_attention K=24, T=1000"] = attention, dict(key=24, window=100, segments=True, length=1000)
    sizes = dict(states=37, patterns=20, key=20, value=12, steps=3, dtype="float32")
    found["hopfield_retrieval N=37 M=20 D=20 V=12, 3 updates, float32"] = hopfield, sizes
    return found


def compile_case(make, arguments, target) -> dict:
    """Returns how long it took and what every kernel takes of VMEM, or what the compiler said."""
    device = jax.sharding.SingleDeviceSharding(topologies.topology_devices(topologies.find(target), 1)[0])
    run, specs, *needed = make(**arguments)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), specs)
    begin = time.perf_counter()
    try:
        with use(NAMED[target]):
            compiled = jax.jit(run).trace(*specs).lower(lowering_platforms=("tpu",)).compile()
    except Exception as error:  # whatever the compiler objects to is the result
        return {"ok": False, "error": str(error)[:2000]}
    kernels = {}
    for line in compiled.as_text().splitlines():
        if 'custom_call_target="tpu_custom_call"' in line:
            name, taken = KERNEL.search(line), SCOPED.search(line)
            kernels[name[1] if name else line.split("=")[0].strip()] = int(taken[1]) if taken else None
    seconds = round(time.perf_counter() - begin, 1)
    result = {"ok": bool(kernels), "seconds": seconds, "vmem_bytes": dict(sorted(kernels.items()))}
    for flops in needed:
        result["flops_over_needed"] = compiled.cost_analysis()["flops"] / flops
        result["ok"] &= result["flops_over_needed"] <= MOST_FLOPS
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, help="write the results there, as JSON")
    parser.add_argument("--only", default="", help="the cases whose name holds this")
    options = parser.parse_args()
    topologies.prepare()
    results = {}
    for case, (make, arguments) in cases().items():
        if options.only in case:
            results[case] = {}
            for target in TARGETS:
                result = results[case][target] = compile_case(make, arguments, target)
                flops = f", {result['flops_over_needed']:.3f} x FLOPs" if "flops_over_needed" in result else ""
                print(f"{case}: {target} {result.get('vmem_bytes') or result.get('error')}{flops}", flush=True)
    wrong = [(case, target) for case, by in results.items() for target, result in by.items() if not result["ok"]]
    if wrong or not results:
        sys.exit(
            "\n".join(f"{case} does not compile for {target} as it must" for case, target in wrong) or "no such case"
        )
    if options.output:
        record = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "make test-compile",
            "device": "TPU v5e and v6e, described; nothing was run",
            "versions": {name: version(name) for name in ("jax", "jaxlib", "libtpu")}
            | {"python": ".".join(map(str, sys.version_info[:3]))},
            "results": results,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n")
    count = sum(len(result["vmem_bytes"]) for by in results.values() for result in by.values())
    print(f"{count} kernels in {len(results)} programs for {len(TARGETS)} TPUs compile.")


if __name__ == "__main__":
    main()
