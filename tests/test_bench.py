"""`engrax bench`: every operation can be timed, and what a row says of it is true of that row."""

import contextlib
import json
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import engrax.pallas_kernels as kernels
from engrax import cli
from engrax.pallas_kernels.bench import baselines, bench

LOG_DECAY = dict(batch=1, seq=24, heads=2, key=8, value=8, chunk_size=16)
TINY = {
    "linear_attention": dict(LOG_DECAY, gate="channel"),
    "gated_delta_rule": dict(LOG_DECAY, gate="scalar"),
    "neural_memory": dict(LOG_DECAY, hidden=8, depth=2),
    "grouped_matmul": dict(batch=1, seq=24, owners=3, features=8, outputs=8),
    "linear_cross_entropy": dict(batch=1, seq=24, features=8, vocabulary=50),
    "hopfield_retrieval": dict(batch=1, seq=24, patterns=30, heads=2, key=8, value=8, steps=3),
    "softmax_attention": dict(batch=1, seq=24, heads=2, groups=1, key=8, window=7),
}


@pytest.mark.deep
@pytest.mark.parametrize("op", bench.OPERATIONS)
def test_a_row_of_every_operation(op):
    case = bench.Case(op, TINY[op])
    (row,) = bench.bench([op], cases=[case], runs=2, implementations=["xla"])
    assert row["sizes"] == TINY[op] and row["implementation"] == "xla"
    for part in ("forward", "forward_backward"):
        assert row[part]["speedup_over_xla"] == 1.0
        assert 0 < row[part]["ms"]["min"] <= row[part]["ms"]["median"] <= row[part]["ms"]["max"]
        assert row[part]["roofline"]["fraction"] > 0 and row[part]["roofline"]["binds"] in ("compute", "memory")
    assert row["forward_backward"]["roofline"]["flops"] > row["forward"]["roofline"]["flops"]
    assert max(row["error"].values()) < 1e-5
    described = bench.describe(json.loads(json.dumps(row)))
    assert op in described and "of the roofline" in described


def test_a_kernel_that_cannot_run_is_a_row_that_says_so():
    case = bench.Case("linear_attention", TINY["linear_attention"])
    (row,) = bench.bench(["linear_attention"], cases=[case], runs=1, implementations=["pallas_tpu"])
    assert "pallas_tpu" in row["unsupported"] and row["unsupported"] in bench.describe(row)


def test_defaults_cover_every_operation():
    for backend in ("cpu", "gpu"):
        for op in bench.OPERATIONS:
            assert bench.default_cases(op, backend), (op, backend)


@pytest.mark.deep
def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "default_cases", lambda op, backend: [bench.Case(op, TINY[op])])
    output = tmp_path / "deep" / "bench.json"
    args = ["bench", "linear_attention", "--runs", "1", "--quick", "--output", str(output)]
    assert cli.main(args) == 0
    assert "linear_attention" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["device"]["platform"] == "cpu"
    assert [row["implementation"] for row in written["rows"]] == ["xla", "fla", "jla"]  # yardsticks: beside one gate
    assert written["limits"]["source"] == "measured" and written["versions"]["jax"]


def test_mistakes_take_one_line(capsys):
    for args in (["linear_attn"], ["linear_attention", "--implementations", "xlo", "--quick"]):
        assert cli.main(["bench", *args]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "did you mean" in error, error


# Peers: stand-ins for their packages, as none of them runs on a CPU.


class Tensor:
    """What the bench uses of a PyTorch tensor."""

    def __init__(self, x):
        self.x = jnp.asarray(x)

    def __add__(self, other):
        return Tensor(self.x + other.x)

    float = cpu = clone = detach = requires_grad_ = lambda self: self
    sin = lambda self: Tensor(jnp.sin(self.x))  # noqa: E731
    sum = lambda self: Tensor(jnp.sum(self.x))  # noqa: E731
    numpy = lambda self: np.asarray(self.x)  # noqa: E731


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    record = lambda self: None  # noqa: E731
    elapsed_time = lambda self, after: 0.25  # noqa: E731


@pytest.fixture
def gpu(monkeypatch):
    """A process that seems to have a Hopper GPU, PyTorch, Triton 3.6.0 and the peers; yields (calls, triton)."""
    calls = []

    def rule(kind, gates, wrap=lambda x: x):
        def call(q, k, v, *, scale, output_final_state, **named):
            q, k, v, *values = (getattr(x, "x", x) for x in (q, k, v, *named.values()))
            assert output_final_state and set(named) == set(gates), (kind, named)
            calls.append((kind, scale, q.shape, {name: x.shape for name, x in zip(named, values)}))
            op = kernels.gated_delta_rule if "beta" in gates else kernels.linear_attention
            out, state = op(q, k, v, **dict(zip(named, values)), scale=scale)
            return wrap(out), wrap(state)

        return call

    def module(name, **members):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**members))
        return sys.modules[name]

    gates = dict(simple_gla=["g"], gla=["g"], delta_rule=["beta"], gated_delta_rule=["g", "beta"], kda=["g", "beta"])
    for kind, names in gates.items():
        module(f"fla.ops.{kind}", **{f"chunk_{kind}": rule(kind, names, Tensor)})
    cuda = dict.fromkeys(("synchronize", "reset_peak_memory_stats"), lambda: None)
    cuda |= dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda: 2**20)
    cuda |= dict(is_available=lambda: True, get_device_capability=lambda: (9, 0), Event=Event)
    autograd = types.SimpleNamespace(grad=lambda total, tensors: [Tensor(0 * x.x) for x in tensors])
    module(
        "torch",
        from_dlpack=Tensor,
        cuda=types.SimpleNamespace(**cuda),
        autograd=autograd,
        no_grad=contextlib.nullcontext,
    )
    triton = module("triton", __version__="3.6.0")
    module("fla.ops")
    own = {"deltanet": "delta_rule", "gated_deltanet": "gated_delta_rule"}

    def jla(kind, q, k, v, *, impl, **named):
        assert impl == "mosaic_gpu"
        return rule(f"jla {kind}", gates[own.get(kind, kind)])(q, k, v, **named)

    module("jla.ops", linear_attention=jla)

    def attention(q, k, v, *, scale, is_causal, implementation):
        assert is_causal
        calls.append((f"attention {implementation}", scale, q.shape, {}))
        return v

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    monkeypatch.setattr(baselines, "_cuda_here", lambda: True)
    yield calls, triton


def rows_of(op, gate, names):
    case = bench.Case(op, LOG_DECAY | dict(gate=gate))
    return {row["implementation"]: row for row in bench.bench([op], cases=[case], runs=1, implementations=names)}


@pytest.mark.parametrize(
    "op, gate, kind, reason",
    [
        ("linear_attention", "scalar", "simple_gla", "640"),
        ("linear_attention", "channel", "gla", None),
        ("gated_delta_rule", "none", "delta_rule", "984"),
        ("gated_delta_rule", "scalar", "gated_delta_rule", "640"),
    ],
)
def test_flash_linear_attention_gets_our_arrays_and_gives_gradients_where_they_are_sound(
    gpu, monkeypatch, op, gate, kind, reason
):
    calls, triton = gpu
    if op == "gated_delta_rule":  # its reference takes seconds to compile
        fake = lambda *case, gradients: {"forward": 0.0, **({"gradients": 1.0} if gradients else {})}  # noqa: E731
        monkeypatch.setattr(bench, "errors", fake)
    row = rows_of(op, gate, ["fla"])["fla"]
    names = [name for name, used in (("g", gate != "none"), ("beta", op == "gated_delta_rule")) if used]
    shapes = {name: (1, 24, 2, 8) if gate == "channel" else (1, 24, 2) for name in names}
    assert calls[0] == (kind, 8**-0.5, (1, 24, 2, 8), shapes)
    assert row["error"]["forward"] < 1e-5 and row["forward"]["device_ms"] == 0.25
    assert ("forward_backward" in row) == ("gradients" in row["error"]) == (reason is None)
    described = bench.describe(row)
    if reason:
        assert reason in row["forward_only"] and row["forward_only"] in described
        triton.__version__ = "3.7.1+cu130"
        assert (baselines.forward_only("fla", op, row["sizes"]) is None) == (reason == "640")
    else:
        assert row["error"]["gradients"] == pytest.approx(1)  # the stand-in's gradients are zeros


def test_jax_linear_attention_gets_our_arrays(gpu):
    row = rows_of("linear_attention", "scalar", ["jla"])["jla"]
    assert gpu[0][0][0] == "jla simple_gla" and max(row["error"].values()) < 1e-5 and "roofline" in row["forward"]
    for gate, kind in (("none", "deltanet"), ("scalar", "gated_deltanet")):
        arrays, run = bench.make_problem(bench.Case("gated_delta_rule", LOG_DECAY | dict(gate=gate)), jnp.float32)
        assert jax.eval_shape(lambda arrays: run(arrays, "jla"), arrays)[0].shape == (1, 24, 2, 8)  # noqa: B023
        assert gpu[0][-1][0] == f"jla {kind}"


def test_cudnn_attention_is_a_yardstick(gpu):
    row = rows_of("linear_attention", "scalar", ["cudnn"])["cudnn"]
    assert gpu[0][0] == ("attention cudnn", 8**-0.5, (1, 24, 2, 8), {})
    assert "error" not in row and "roofline" not in row["forward"] and "yardstick" in bench.describe(row)


def test_a_peer_that_fails_is_a_row_that_says_so(gpu, monkeypatch):
    def fail(*args, **named):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(sys.modules["fla.ops.gla"], "chunk_gla", fail)
    assert "RuntimeError: out of registers" in bench.describe(rows_of("linear_attention", "channel", ["fla"])["fla"])


def test_peers_that_cannot_run_take_one_line_each(monkeypatch):
    cases = [bench.Case("linear_attention", LOG_DECAY | dict(gate=gate)) for gate in ("scalar", "channel")]
    rows = list(bench.bench(["linear_attention"], cases=cases, runs=1, implementations=baselines.PEERS))
    assert [row["implementation"] for row in rows] == ["fla", "jla", "cudnn", "attention"]  # attention: measured, once
    lines = [bench.describe(row) for row in rows[:3]]
    assert all("is left out: it needs a CUDA device" in line and "\n" not in line for line in lines)
    assert rows[3]["forward_backward"]["ms"]["median"] > 0
    monkeypatch.setattr(baselines, "_cuda_here", lambda: True)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "jla.ops", None)
    assert "fla-core==0.6.0" in baselines.missing("fla") and "jax-linear-attention" in baselines.missing("jla")
