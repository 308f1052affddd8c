"""Times every implementation of an operation and compares it with the device's limits; `engrax bench`.

Only jax is required. Forward is the call alone; forward + backward includes the gradient of every array argument. Each
figure is the median wall-clock time of a blocking call over runs. On a GPU, the kernels' time (CUPTI) is also reported.
Error is the relative root mean square difference from the float64 reference on shorter rows. Peers, other libraries'
implementations, are timed in the same run if possible (`baselines`).
"""

import datetime
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import engrax.pallas_kernels as kernels
from engrax.pallas_kernels.bench import baselines
from engrax.pallas_kernels.dispatch import OPERATIONS, available
from engrax.pallas_kernels.grouped_matmul.grouping import BLOCK

UNFUSED = "attentions"  # of Hopfield retrieval: attentions in sequence, as one would write them without the operation
PARTS = ("forward", "forward_backward")
ERROR_TOKENS = 256  # the reference runs token by token
# Vendor figures: dense bfloat16 matrix products (operations per second), memory (bytes per second). float32 counts
# as bfloat16 / 2 on GPUs (TF32) and bfloat16 / 6 on TPUs (six bfloat16 passes).
PEAKS = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "TPU v5 lite": (197e12, 0.82e12),
    "TPU v6 lite": (918e12, 1.64e12),
}
FLOAT32_SHARE = {"gpu": 1 / 2, "tpu": 1 / 6, "cpu": 1.0}


class Case(NamedTuple):
    """One shape of one operation."""

    op: str
    sizes: dict[str, Any]  # batch, seq, heads, key, value, ...: the arguments of the operation's cost functions

    def __str__(self) -> str:
        return f"{self.op} " + " ".join(f"{name}={value}" for name, value in self.sizes.items())


def default_cases(op: str, backend: str) -> list[Case]:
    """Returns the shapes at which `op` is timed: 64K tokens in rows of 2K to 64K on an accelerator, fewer on a CPU.

    Raises ValueError for an unknown operation.
    """
    available(op)  # rejects an unknown operation, naming the nearest
    if op == "linear_cross_entropy":
        rows = [dict(batch=1, seq=1024, features=256, vocabulary=8192)]
        if backend != "cpu":
            rows = [dict(batch=8, seq=1024, features=768, vocabulary=50304)]
        return [Case(op, row) for row in rows]
    if op == "grouped_matmul":
        sizes = dict(batch=1, seq=1024, owners=5, features=256, outputs=256)
        if backend != "cpu":
            sizes |= dict(batch=8, seq=6144, features=1024, outputs=2048)
        return [Case(op, sizes)]
    if op == "hopfield_retrieval":
        sizes = dict(batch=1, seq=1024, patterns=1024, heads=4, key=64, value=64)
        if backend != "cpu":
            sizes |= dict(batch=8, seq=4096, heads=16)
        return [Case(op, sizes | dict(steps=steps)) for steps in (1, 3, 8)]
    if op == "softmax_attention":
        sizes = dict(batch=4, seq=512, heads=4, groups=4, key=64)
        if backend != "cpu":
            sizes |= dict(batch=8, seq=4096, heads=16, groups=16)
        return [Case(op, sizes), Case(op, sizes | dict(window=sizes["seq"] // 4))]
    if backend == "cpu":
        tokens, lengths, heads, width = 2048, (512, 2048), 4, 64
    else:
        tokens, lengths, heads, width = 65536, (2048, 8192, 32768, 65536), 16, 128
    deep = [dict(hidden=2 * width, depth=2)]
    if backend != "cpu":
        deep.append(dict(key=64, value=64, hidden=128, depth=2))  # the largest size that the GPU kernel serves
    more = {"neural_memory": [dict(hidden=width, depth=1), *deep]}.get(op)
    if more is None:
        gates = ("none",) if op == "gated_delta_rule" and backend != "cpu" else ()
        more = [dict(gate=gate) for gate in ("scalar", "channel", *gates)]
    base = [dict(batch=tokens // n, seq=n, heads=heads, key=width, value=width, chunk_size=64) for n in lengths]
    return [Case(op, sizes | extra) for extra in more for sizes in base]


def _normal(key, shape, dtype, unit=False):
    x = jax.random.normal(key, shape, jnp.float32)
    return (x / jnp.linalg.norm(x, axis=-1, keepdims=True) if unit else x).astype(dtype)


def _log_decay_problem(case: Case, dtype):
    s = case.sizes
    keys = jax.random.split(jax.random.key(0), 6)
    rows = (s["batch"], s["seq"], s["heads"])
    delta = case.op == "gated_delta_rule"
    arrays = {name: _normal(key, (*rows, s["key"]), dtype, delta) for name, key in zip("qk", keys)}
    arrays["v"] = _normal(keys[2], (*rows, s["value"]), dtype)
    width = {"none": None, "scalar": (), "channel": (s["key"],)}[s["gate"]]
    if width is not None:
        arrays["g"] = -0.1 * jax.random.uniform(keys[3], (*rows, *width), jnp.float32)
    if delta:
        arrays["beta"] = jax.random.uniform(keys[4], rows, jnp.float32)
    call = getattr(kernels, case.op)

    def run(arrays, implementation):
        if implementation in baselines.PEERS:
            return baselines.call(implementation, case.op, s, arrays)
        named = {name: x for name, x in arrays.items() if name not in "qkv"}
        q_k_v = (arrays[name] for name in "qkv")
        return call(*q_k_v, **named, chunk_size=s["chunk_size"], implementation=implementation)

    return arrays, run


def _neural_memory_problem(case: Case, dtype):
    s = case.sizes
    keys = jax.random.split(jax.random.key(0), 12)
    rows = (s["batch"], s["seq"], s["heads"])
    arrays = {name: _normal(key, (*rows, s["key"]), dtype, True) for name, key in zip("qk", keys)}
    arrays["v"] = _normal(keys[2], (*rows, s["value"]), dtype, True)
    widths = [s["key"], *[s["hidden"]] * (s["depth"] - 1), s["value"]]
    gates = jax.random.uniform(keys[3], (3, *rows), jnp.float32)
    arrays |= dict(lr=gates[0] * 0.5 / s["chunk_size"], momentum=0.9 * gates[1], forget=0.1 * gates[2])
    arrays["weights"] = tuple(
        _normal(key, (s["heads"], i, o), jnp.float32) * i**-0.5 for key, i, o in zip(keys[4:], widths, widths[1:])
    )

    def run(arrays, implementation):
        arrays = dict(arrays)
        state = kernels.NeuralMemoryState.start(arrays.pop("weights"), s["batch"])
        q_k_v = [arrays.pop(name) for name in "qkv"]
        options = dict(chunk_size=s["chunk_size"], implementation=implementation)
        out, state = kernels.neural_memory(*q_k_v, **arrays, state=state, **options)
        return out, (state.weights, state.momentum)

    return arrays, run


def _cross_entropy_problem(case: Case, dtype):
    s = case.sizes
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = dict(
        hidden=_normal(keys[0], (s["batch"], s["seq"], s["features"]), dtype),
        embedding=_normal(keys[1], (s["vocabulary"], s["features"]), dtype),
    )
    labels = jax.random.randint(keys[2], (s["batch"], s["seq"]), 0, s["vocabulary"])

    def run(arrays, implementation):
        call = kernels.linear_cross_entropy
        nats, _ = call(arrays["hidden"], arrays["embedding"], labels, implementation=implementation)
        return nats, ()

    return arrays, run


def _grouped_problem(case: Case, dtype):
    s = case.sizes
    keys, rows = jax.random.split(jax.random.key(0), 3), min(BLOCK, s["seq"])
    lead = (s["batch"], s["seq"] // rows)
    arrays = dict(
        x=_normal(keys[0], (*lead, rows, s["features"]), dtype),
        kernels=_normal(keys[1], (s["owners"], s["features"], s["outputs"]), dtype),
    )
    owner = jnp.sort(jax.random.randint(keys[2], lead, 0, s["owners"]), axis=1)

    def run(arrays, implementation):
        return kernels.grouped_matmul(**arrays, owner=owner, implementation=implementation), ()

    return arrays, run


def _hopfield_problem(case: Case, dtype):
    s = case.sizes
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"state": (s["seq"], s["key"]), "stored": (s["patterns"], s["key"]), "values": (s["patterns"], s["value"])}
    arrays = {
        name: _normal(key, (s["batch"], rows, s["heads"], width), dtype)
        for key, (name, (rows, width)) in zip(keys, shapes.items())
    }

    def run(arrays, implementation):
        beta, steps = s["key"] ** -0.5, s["steps"]
        if implementation != UNFUSED:
            return kernels.hopfield_retrieval(**arrays, beta=beta, steps=steps, implementation=implementation), ()
        x, stored = arrays["state"], arrays["stored"]
        for values in (*[stored] * (steps - 1), arrays["values"]):
            x = jax.nn.dot_product_attention(x, stored, values, scale=beta)
        return x, ()

    return arrays, run


def _attention_problem(case: Case, dtype):
    s = case.sizes
    keys = jax.random.split(jax.random.key(0), 3)
    heads = dict(q=s["heads"], k=s["groups"], v=s["groups"])
    arrays = {
        name: _normal(key, (s["batch"], s["seq"], count, s["key"]), dtype)
        for key, (name, count) in zip(keys, heads.items())
    }

    def run(arrays, implementation):
        call = kernels.softmax_attention
        return call(**arrays, window=s.get("window"), implementation=implementation), ()

    return arrays, run


def make_problem(case: Case, dtype) -> tuple[dict[str, Any], Callable]:
    """Returns the arrays of a case and `run(arrays, implementation) -> (out, final state)`."""
    makers = {
        "neural_memory": _neural_memory_problem,
        "grouped_matmul": _grouped_problem,
        "linear_cross_entropy": _cross_entropy_problem,
        "hopfield_retrieval": _hopfield_problem,
        "softmax_attention": _attention_problem,
    }
    return makers.get(case.op, _log_decay_problem)(case, dtype)


def _total(run, implementation):
    """A scalar that weights every output differently, so that every cotangent differs."""

    def total(arrays):
        outputs = jax.tree.leaves(run(arrays, implementation))
        return sum(jnp.sum(jnp.sin(x.astype(jnp.promote_types(x.dtype, jnp.float32)))) for x in outputs)

    return total


def errors(case: Case, implementation: str, dtype, gradients: bool = True) -> dict[str, float]:
    """Returns the relative RMS errors of the output and of the worst gradient against the float64 reference."""
    short = case._replace(sizes=case.sizes | dict(batch=1, seq=min(case.sizes["seq"], ERROR_TOKENS)))
    arrays, run = make_problem(short, dtype)

    def results(arrays, implementation):
        if implementation == baselines.FLA:
            forward, backward = baselines.torch_programs(short.op, short.sizes, arrays)
            out, *grads = baselines.to_numpy((forward()[0], *(backward() if gradients else ())))
            return out, dict(zip(arrays, grads))
        out = run(arrays, implementation)[0]
        grads = jax.grad(_total(run, implementation))(arrays) if gradients else {}
        return jax.tree.map(np.asarray, (out, grads))

    with jax.enable_x64(True):
        exact = results(jax.tree.map(lambda x: x.astype(jnp.float64), arrays), "reference")
    out, grads = results(arrays, implementation)

    def error(a, b):
        a = np.asarray(a, np.float64)
        return float(np.sqrt(np.mean((a - b) ** 2)) / max(np.sqrt(np.mean(b**2)), 1e-30))

    found = {"forward": error(out, exact[0])}
    return found | ({"gradients": max(jax.tree.leaves(jax.tree.map(error, grads, exact[1])))} if gradients else {})


def _spread(times: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(times)), "min": min(times), "max": max(times)}


def _milliseconds(program, arrays, runs: int) -> dict[str, float]:
    for _ in range(2):
        jax.block_until_ready(program(arrays))
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(program(arrays))
        times.append((time.perf_counter() - begin) * 1e3)
    return _spread(times)


def _device_milliseconds(program, arrays) -> float | None:
    """The time of the GPU's kernels, without the host's; None without CUPTI."""
    if jax.default_backend() != "gpu":
        return None
    profiler = import_module("jax.experimental.mosaic.gpu.profiler")
    return profiler.measure(program, mode="cupti", iterations=5)(arrays)[1]


def peaks(dtype) -> tuple[float, float, str]:
    """Returns (operations per second, bytes per second, source of the figures) of the first device."""
    device = jax.devices()[0]
    if device.device_kind in PEAKS:
        compute, memory = PEAKS[device.device_kind]
        share = 1.0 if jnp.dtype(dtype).itemsize == 2 else FLOAT32_SHARE[jax.default_backend()]
        return compute * share, memory, "vendor"
    n = 1024
    square, long = jnp.ones((n, n), dtype), jnp.ones(2**24, jnp.float32)
    product = _milliseconds(jax.jit(lambda x: x @ x), square, 7)["min"]
    copy = _milliseconds(jax.jit(lambda x: x + 1), long, 7)["min"]
    return 2 * n**3 / product * 1e3, 2 * long.nbytes / copy * 1e3, "measured"


def _roofline(case: Case, dtype, ms: float, backward: bool, limits) -> dict[str, Any]:
    cost = import_module(f"engrax.pallas_kernels.{case.op}.cost")
    itemsize = jnp.dtype(dtype).itemsize
    sizes = dict(case.sizes)
    operations = cost.flops(**{k: v for k, v in sizes.items() if k != "gate"})
    traffic = cost.traffic_bytes(**_without_chunk(case), itemsize=itemsize)
    operations = operations.forward + backward * operations.backward
    traffic = traffic.forward + backward * traffic.backward
    by_compute, by_memory = operations / limits[0], traffic / limits[1]
    binds = "compute" if by_compute > by_memory else "memory"
    return {"fraction": max(by_compute, by_memory) * 1e3 / ms, "binds": binds, "flops": operations, "bytes": traffic}


def _without_chunk(case: Case) -> dict[str, Any]:
    """The sizes that the traffic depends on; for the log-decay operations, these exclude the chunk."""
    keep_chunk = case.op == "neural_memory"
    return {name: value for name, value in case.sizes.items() if keep_chunk or name != "chunk_size"}


def _time(case: Case, implementation: str, dtype, runs: int, part: str) -> dict[str, Any]:
    arrays, run = make_problem(case, dtype)
    if implementation == baselines.FLA:
        programs = baselines.torch_programs(case.op, case.sizes, arrays)
        times = baselines.torch_times(programs[part == "forward_backward"], runs)
        device = float(np.median(times.device))
        return {"ms": _spread(times.wall), "device_ms": device, "temporary_mb": times.temporary_mb}
    call, gradient = (lambda arrays: run(arrays, implementation)), jax.value_and_grad(_total(run, implementation))
    function = call if part == "forward" else gradient
    compiled = jax.jit(function).lower(arrays).compile()
    return {
        "ms": _milliseconds(compiled, arrays, runs),
        "device_ms": _device_milliseconds(jax.jit(function), arrays),
        "temporary_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
    }


def measure(case: Case, implementation: str, dtype, runs: int, limits) -> dict[str, Any]:
    """Returns one row: times, memory, roofline and errors of one implementation or peer at one shape."""
    row: dict[str, Any] = {"op": case.op, "sizes": case.sizes, "implementation": implementation}
    reason = baselines.forward_only(implementation, case.op, case.sizes)
    if reason:
        row["forward_only"] = reason
    for part in PARTS[:1] if reason else PARTS:
        row[part] = times = _time(case, implementation, dtype, runs, part)
        if implementation not in baselines.YARDSTICKS:
            ms = times["device_ms"] or times["ms"]["median"]
            times["roofline"] = _roofline(case, dtype, ms, part != "forward", limits)
    if implementation not in baselines.YARDSTICKS:
        row["error"] = errors(case, implementation, dtype, gradients=not reason)
    return row


def _measure_or_why(case: Case, name: str, dtype, runs: int, limits) -> dict[str, Any]:
    """Returns `measure`'s row, or a row that says why nothing is measured."""
    caught = Exception if name in baselines.PEERS else NotImplementedError  # other libraries' code may raise anything
    try:
        return measure(case, name, dtype, runs, limits)
    except caught as error:
        reason = str(error) if type(error) is NotImplementedError else f"{type(error).__name__}: {error}"
        return {"op": case.op, "sizes": case.sizes, "implementation": name, "unsupported": reason}


def bench(
    ops: Sequence[str] = OPERATIONS,
    *,
    dtype: str | None = None,
    implementations: Sequence[str] | None = None,
    cases: Sequence[Case] | None = None,
    runs: int = 11,
) -> Iterator[dict[str, Any]]:
    """Yields one row per shape and implementation, with its ratio to "xla" at the same shape.

    dtype: of q, k and v; default bfloat16 on an accelerator, float32 on a CPU. implementations: default all that can
    run here except the token-by-token reference, and the peers. A peer that cannot run gives one row that says why.
    Raises ValueError for an unknown operation.
    """
    backend = jax.default_backend()
    dtype = jnp.dtype(dtype or ("float32" if backend == "cpu" else "bfloat16"))
    limits = peaks(dtype)
    left_out: set[str] = set()
    for op in ops:
        names = implementations or [name for name in available(op).names if name != "reference"]
        if not implementations:
            names = [*names, *([UNFUSED] if op == "hopfield_retrieval" else []), *baselines.PEERS]
        for case in [c for c in cases if c.op == op] if cases is not None else default_cases(op, backend):
            xla = None
            for name in sorted(names, key=lambda name: name != "xla"):
                if name in baselines.PEERS:
                    if name in left_out or not baselines.serves(name, case.op, case.sizes):
                        continue
                    if reason := baselines.missing(name):
                        left_out.add(name)
                        yield {"implementation": name, "left_out": reason}
                        continue
                row = _measure_or_why(case, name, dtype, runs, limits)
                xla = row if name == "xla" else xla
                for part in PARTS:
                    if xla and part in row and part in xla:
                        row[part]["speedup_over_xla"] = xla[part]["ms"]["median"] / row[part]["ms"]["median"]
                yield row


def describe(row: dict[str, Any]) -> str:
    """Returns the lines printed for one row."""
    if "left_out" in row:
        return f"{row['implementation']} is left out: {row['left_out']}"
    head = f"{Case(row['op'], row['sizes'])}  {row['implementation']}"
    if "unsupported" in row:
        return f"{head}: {row['unsupported']}"
    words = {"forward": "error", "gradients": "of gradients"}
    errors = ", ".join(f"{words[name]} {error:.1e}" for name, error in row.get("error", {}).items())
    lines = [f"{head}: {errors or 'a yardstick, another function'}"]
    for part in PARTS:
        if part not in row:
            lines.append(f"  forward only: {row['forward_only']}")
            continue
        r = row[part]
        spread = f"({r['ms']['min']:.3f} to {r['ms']['max']:.3f})"
        device = f", kernels {r['device_ms']:.3f} ms" if r["device_ms"] is not None else ""
        speedup = f", {r['speedup_over_xla']:.2f} x xla" if "speedup_over_xla" in r else ""
        line = f"  {part.replace('_', ' + '):18} {r['ms']['median']:9.3f} ms {spread}{device}{speedup}; "
        line += f"{r['temporary_mb']:.1f} MB"
        if "roofline" in r:
            line += f"; {100 * r['roofline']['fraction']:.1f} % of the roofline ({r['roofline']['binds']} binds)"
        lines.append(line)
    return "\n".join(lines)


def report(rows: Sequence[dict[str, Any]], dtype: str | None = None) -> dict[str, Any]:
    """Returns the content of the JSON file: the rows and the setup they were measured on."""
    device = jax.devices()[0]
    limits = peaks(jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "limits": {"flops_per_second": limits[0], "bytes_per_second": limits[1], "source": limits[2]},
        "versions": {"jax": jax.__version__, "python": platform.python_version()},
        "rows": list(rows),
    }
