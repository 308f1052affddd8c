"""The operation `gated_delta_rule`: against the token-by-token reference, its precision, its cost and its messages."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import available, gated_delta_rule
from engrax.pallas_kernels.common.log_decay import LogDecayPlan
from engrax.pallas_kernels.gated_delta_rule import cost, xla
from engrax.pallas_kernels.gated_delta_rule.vjp import DeltaInputs
from engrax.tests import op_problems as problems
from engrax.tests.op_problems import call, make_problem, values_and_grads

OP = "gated_delta_rule"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of at most 12 chunks of all rows and heads: without it the rows of these tests are one group."""
    monkeypatch.setattr(xla, "GROUP_CPU", 12)
    jax.clear_caches()
    yield
    jax.clear_caches()


COVERING = [
    dict(gate="none", length=63, chunk=64, groups=2, keys="correlated"),
    dict(gate="none", length=1, chunk=64, segments="packed", batch=3),
    dict(gate="scalar", length=75, chunk=16, groups=2, segments="packed", batch=3),
    dict(gate="scalar", length=75, chunk=64, keys="identical", gates="mixed", state=False),
    dict(gate="channel", length=75, chunk=24, groups=2, segments="states", batch=3),
]
IN_GROUPS = [
    dict(gate="scalar", length=75, chunk=8, segments="states", batch=3),
    dict(gate="channel", length=75, chunk=16, keys="correlated"),
]
every_gate = pytest.mark.parametrize(
    "gate, gates", [("none", "zero"), ("scalar", "mixed"), ("scalar", "reset"), ("channel", "reset")]
)
as_words = dict(ids=lambda case: "-".join(map(str, case.values())))


@pytest.mark.parametrize("case", COVERING, **as_words)
def test_xla_equals_reference(case):
    problems.check_against_reference(OP, "xla", case)


@pytest.mark.deep
@pytest.mark.parametrize("case", IN_GROUPS, **as_words)
def test_xla_equals_reference_in_groups(case, small_groups):
    problems.check_against_reference(OP, "xla", case)


@pytest.mark.long
@pytest.mark.parametrize("keys, segments", [("random", "one"), ("correlated", "packed"), ("identical", "states")])
@pytest.mark.parametrize(
    "gate, gates", [("none", "zero"), ("scalar", "mixed"), ("scalar", "reset"), ("channel", "reset")]
)
@pytest.mark.parametrize("length, chunk", [(1, 64), (63, 64), (63, 5), (75, 16), (75, 1), (1000, 64), (1000, 48)])
def test_xla_equals_reference_grid(length, chunk, gate, gates, keys, segments):
    case = dict(length=length, chunk=chunk, gate=gate, gates=gates, keys=keys, segments=segments, groups=2, batch=3)
    problems.check_against_reference(OP, "xla", case)


# Precision


def precision_problem(keys, beta, **case):
    """Returns (arrays, static) with keys of `make_problem`, or "runs" of 64 identical ones; beta None: mixed."""
    arrays, static = make_problem(OP, keys="random" if keys == "runs" else keys, key=32, value=32, **case)
    if keys == "runs":
        length = arrays["k"].shape[1]
        arrays["k"] = jnp.repeat(arrays["k"][:, ::64], 64, axis=1)[:, :length]
    if beta is not None:
        arrays["beta"] = jnp.full_like(arrays["beta"], beta)
    return arrays, static


def check_float32(keys, beta, **case):
    arrays, static = precision_problem(keys, beta, **case)
    got, recurrence = problems.errors(OP, problems.in_dtype(arrays, jnp.float32), static, "xla", "reference")
    for (path, error), own in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(recurrence), strict=True):
        assert error <= max(problems.FLOAT32_ERROR, 20 * own), (jax.tree_util.keystr(path), error, own)


@pytest.mark.parametrize(
    "gate, keys, beta", [("none", "runs", 2.0), pytest.param("channel", "correlated", None, marks=pytest.mark.deep)]
)
def test_float32(gate, keys, beta):
    check_float32(keys, beta, gate=gate, length=150, chunk=64)


@pytest.mark.long
@pytest.mark.parametrize(
    "keys, beta", [("random", 0.0), ("random", None), ("correlated", 1.0), ("correlated", None), ("runs", 2.0)]
)
@pytest.mark.parametrize(
    "gate, gates", [("none", "zero"), ("scalar", "mixed"), ("scalar", "reset"), ("channel", "reset")]
)
@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_float32_grid(gate, gates, keys, beta, chunk):
    check_float32(keys, beta, gate=gate, gates=gates, length=1000, chunk=chunk)


@pytest.mark.parametrize(
    "gate, keys, beta, worst",
    [pytest.param("scalar", "random", None, 0.02, marks=pytest.mark.deep), ("none", "identical", 2.0, 0.06)],
)
def test_bfloat16(gate, keys, beta, worst):
    """Inputs in bfloat16, sums in float32. Identical keys at beta 2 err by 1 where the inverse is rounded too."""
    arrays, static = precision_problem(keys, beta, gate=gate, length=200, chunk=64)
    arrays = problems.in_dtype(arrays, jnp.float32, tokens=jnp.bfloat16)
    (out, state), gradient = jax.eval_shape(problems.make_program(OP, static), arrays)
    assert out.dtype == gradient["k"].dtype == jnp.bfloat16
    assert state.dtype == gradient["beta"].dtype == jnp.float32
    (errors,) = problems.errors(OP, arrays, static, "xla")
    assert max(jax.tree.leaves(errors)) < worst, errors


def test_long_run_at_extreme_gates_stays_finite():
    """12,000 tokens, bfloat16, beta up to 2, gates from 0 to -50 and resets: finite values and gradients."""
    arrays, static = make_problem(OP, batch=1, heads=1, length=12_000, chunk=64, keys="correlated")
    arrays = problems.in_dtype(arrays, jnp.float32, tokens=jnp.bfloat16)
    for leaf in jax.tree.leaves(values_and_grads(OP, arrays, static)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


# Cost


def gradient_of_a_call(q, k, v, beta, g):
    run = lambda q, k, v, beta, g: gated_delta_rule(q, k, v, beta=beta, g=g, implementation="xla")  # noqa: E731
    result, vjp = jax.vjp(run, q, k, v, beta, g)
    return vjp(result)


def program(length, gate="scalar", size=32):
    """Returns the gradient of a call with one head, compiled in half the time."""
    token = jax.ShapeDtypeStruct((1, length, 1, size), jnp.float32)
    beta = jax.ShapeDtypeStruct((1, length, 1), jnp.float32)
    g = beta if gate == "scalar" else token
    return problems.compiled(gradient_of_a_call).lower(token, token, token, beta, g).compile()


def temporary_bytes(program):
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.deep
def test_memory_is_linear_in_the_length():
    """And far below a state per token, T x K x V numbers per head."""
    short, long = (temporary_bytes(program(length)) for length in (2048, 16384))
    assert long <= 8.1 * short and long < 0.25 * 16384 * 32 * 32 * 4


TIMED = """
import os, sys, time
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # before any thread starts
import jax, jax.numpy as jnp, numpy as np
from engrax.tests.test_gated_delta_rule import gradient_of_a_call
from engrax.train.host import keep_freed_memory

keep_freed_memory()
rng, programs = np.random.default_rng(0), {}
for length in (2048, 16384):
    q, k, v = (jnp.asarray(rng.normal(size=(1, length, 1, 32)) / 8, jnp.float32) for _ in range(3))
    beta = jnp.full((1, length, 1), 0.5, jnp.float32)
    programs[length] = jax.jit(gradient_of_a_call), (q, k, v, beta, -beta)
seconds = dict.fromkeys(programs, np.inf)
for _ in range(25):
    for length, (program, arrays) in programs.items():
        start = time.process_time()
        for _ in range(16384 // length):
            jax.block_until_ready(program(*arrays))
        seconds[length] = min(seconds[length], time.process_time() - start)
print(seconds[16384] / seconds[2048])
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system does not bind processes to a processor")
def test_time_per_token_does_not_grow_with_the_length(run_python):
    """Processor time of optimised programs on one processor, the fastest of many: other processes may be at work.

    At 2,048 tokens there is one group of chunks, and XLA computes once what both passes need: 1.2 times.
    """
    ratio = float(run_python(TIMED, env={"XLA_FLAGS": ""}).split()[-1])
    assert ratio < 1.3, ratio


@pytest.mark.deep
def test_temporary_memory_with_a_gate_per_channel():
    short, long = (temporary_bytes(program(length, "channel", 64)) for length in (4096, 16384))
    assert long <= 4.1 * short and long < 0.2 * 16384 * 64 * 64 * 4


def test_cost_counts_the_matrix_products():
    """One chunk, so that XLA's own count sees every product; XLA also counts elementwise work."""
    sizes = dict(batch=2, seq=64, heads=4, query_heads=2, key=64, value=96)
    plan = LogDecayPlan(64, 1.0)
    q, v, beta = jnp.ones((2, 64, 2, 64)), jnp.ones((2, 64, 4, 96)), jnp.ones((2, 64, 4))
    inputs = DeltaInputs(q, q, v, beta, None, jnp.ones((2, 4, 64, 96)), None)
    inverses, cotangents = jnp.ones((2, 64, 4, 64)), (v, inputs.state)
    counted = cost.flops(**sizes)
    forward = jax.jit(lambda inputs: xla.forward(plan, inputs)[0])
    backward = jax.jit(lambda inputs: xla.backward(plan, inputs, inverses, cotangents))
    # A single chunk passes no state on: its backward pass goes without the states, and computes w and K dS' once.
    without = 2 * 64 * 4 * (6 * 64 * 96 + 64 * (2 * 64 + 2 * 96))
    for run, wanted in ((forward, counted.forward), (backward, counted.backward - without)):
        assert 0.9 < wanted / run.lower(inputs).compile().cost_analysis()["flops"] < 1.0
    # C(6K + 4V) + 6KV operations beside the inverse, for e(2K + 2V) + 8 bytes, and the state in and out
    plain = dict(batch=1, seq=64, heads=1, key=128, value=128)
    per_token = 64 * 10 * 128 + 6 * 128 * 128
    assert cost.flops(**plain).forward == 64 * per_token + cost.inverse_flops(64)
    assert cost.traffic_bytes(**plain).forward == 64 * (2 * 512 + 8) + 2 * 4 * 128 * 128
    assert cost.saved_bytes(**plain) == 64 * 64 * 4


# Mistakes


BAD = [
    (dict(q=np.zeros((2, 75, 2))), "q has shape"),
    (dict(k=np.zeros((2, 74, 2, 8))), r"k has shape \(2, 74, 2, 8\), wanted \[B, T, H, K\] = \(2, 75, 2, 8\)"),
    (dict(v=np.zeros((2, 75, 3, 6))), "v has 3 heads, wanted a multiple of the 2 heads of q and k"),
    (dict(beta=np.zeros((2, 75))), r"beta has shape \(2, 75\), wanted \[B, T, HV\] = \(2, 75, 2\)"),
    (dict(beta=np.zeros((2, 75, 2), np.int32)), "beta has dtype int32, wanted a floating-point dtype"),
    (dict(beta=1.0), "beta must be an array"),
    (dict(g=np.zeros((2, 75, 2, 6))), r"g has shape \(2, 75, 2, 6\), wanted \[B, T, HV, K\] = \(2, 75, 2, 8\)"),
    (dict(initial_state=np.zeros((2, 2, 6, 8))), r"initial_state has shape .* wanted \[B, HV, K, V\] = \(2, 2, 8, 6\)"),
    (dict(segment_ids=np.zeros((2, 75))), "segment_ids has dtype float64, wanted an integer dtype"),
    (dict(num_segments=3), "num_segments needs segment_ids"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(scale="1"), "scale is '1', wanted a number or None"),
    (dict(implementation="xlaa"), "unknown implementation 'xlaa'; did you mean 'xla'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(change, message):
    arrays, static = make_problem(OP)
    with pytest.raises(ValueError, match=message):
        call(OP, arrays | change, static if "chunk_size" not in change else {})


def test_kernels_that_cannot_run_say_why():
    names, missing = available(OP)
    assert names[:2] == ("reference", "xla")
    arrays, static = make_problem(OP)
    for name in missing:
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: .*; use 'xla' or None."):
            call(OP, arrays, static, implementation=name)
