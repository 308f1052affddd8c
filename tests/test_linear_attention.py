"""The operation `linear_attention`: every implementation against the token-by-token reference, and its own promises."""

import textwrap
import time
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import available, linear_attention
from engrax.pallas_kernels.common.log_decay import LogDecayPlan
from engrax.pallas_kernels.linear_attention import cost, xla
from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
from engrax.tests import op_problems as problems
from engrax.tests.neural_memory_problems import assert_close
from engrax.tests.op_problems import call, make_problem, values, values_and_grads

OP = "linear_attention"


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def small_groups(monkeypatch):
    """Short rows are one group of chunks unless groups are made smaller: here a few chunks, which do not divide all."""
    monkeypatch.setattr(xla, "GROUP_CPU", 12)
    jax.clear_caches()
    yield
    jax.clear_caches()


COVERING = [
    dict(gate="none", length=63, chunk=16, groups=2),
    dict(gate="none", length=1, chunk=64, segments="packed", batch=3),
    dict(gate="scalar", length=75, chunk=16, groups=2, segments="packed", batch=3),
    dict(gate="scalar", length=75, chunk=64, keys="correlated", gates="mixed", state=False),
    dict(gate="channel", length=75, chunk=24, segments="states", batch=3),
]
DEEP = [
    dict(gate="scalar", length=75, chunk=8, segments="states", batch=3),
    dict(gate="channel", length=75, chunk=16, groups=2),
    dict(gate="channel", length=63, chunk=64, keys="identical", gates="mixed"),
]
by_case = pytest.mark.parametrize(
    "case",
    [*COVERING, *(pytest.param(case, marks=pytest.mark.deep) for case in DEEP)],
    ids=lambda case: "-".join(map(str, case.values())),
)


@by_case
def test_xla_equals_reference(case):
    problems.check_against_reference(OP, "xla", case)


@pytest.mark.parametrize(
    "gate, segments",
    [("none", "packed"), ("channel", "one"), pytest.param("scalar", "states", marks=pytest.mark.deep)],
)
def test_groups_of_chunks_change_nothing(gate, segments, small_groups):
    problems.check_against_reference(OP, "xla", dict(gate=gate, segments=segments, length=83, groups=2))
    problems.check_causal(OP, "xla", dict(gate=gate, gates="mixed", groups=2), (15, 16, 40))


@pytest.mark.long
@pytest.mark.parametrize("segments", ["one", "packed", "states"])
@pytest.mark.parametrize("gate, gates", [("none", "zero"), *product(["scalar", "channel"], problems.GATES)])
@pytest.mark.parametrize("length, chunk", [(1, 64), (63, 64), (63, 5), (75, 16), (75, 1), (1000, 64), (1000, 48)])
def test_xla_equals_reference_grid(length, chunk, gate, gates, segments):
    case = dict(length=length, chunk=chunk, gate=gate, gates=gates, segments=segments, groups=2, batch=3)
    problems.check_against_reference(OP, "xla", case)


@pytest.mark.parametrize("gate", ["none", "channel", pytest.param("scalar", marks=pytest.mark.deep)])
def test_float32(gate):
    problems.check_float32(OP, "xla", dict(gate=gate, length=200, chunk=64, keys="correlated", key=32, value=32))


@pytest.mark.long
@pytest.mark.parametrize("gate", ["scalar", "channel"])
@pytest.mark.parametrize("gates", list(problems.GATES))
@pytest.mark.parametrize("chunk", [16, 64, 256])
def test_float32_grid(gate, gates, chunk):
    case = dict(gate=gate, gates=gates, length=1000, chunk=chunk, key=32, value=32, segments="packed")
    problems.check_float32(OP, "xla", case)


@pytest.mark.parametrize("gate", ["none", "scalar", pytest.param("channel", marks=pytest.mark.deep)])
def test_bfloat16(gate):
    """Inputs in bfloat16, sums in float32: the errors of rounding the operands of every product once."""
    arrays, static = make_problem(gate=gate, length=200, chunk=64, key=32, value=32)
    arrays = problems.in_dtype(arrays, jnp.float32, tokens=jnp.bfloat16)
    (out, state), gradient = jax.eval_shape(problems.make_program(OP, static), arrays)
    assert out.dtype == gradient["k"].dtype == jnp.bfloat16 and state.dtype == jnp.float32
    assert gate == "none" or gradient["g"].dtype == jnp.float32
    (worst,) = problems.errors(OP, arrays, static, "xla")
    assert max(jax.tree.leaves(worst)) < 0.012, worst


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("segments", ["packed", "states"])
def test_segments_equal_calls_apart(segments, implementation):
    case = dict(segments=segments, length=40, chunk=8, groups=2)
    problems.check_segments_apart(OP, implementation, case)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("segments, gate", [("packed", "none"), ("states", "scalar")])
def test_padding_writes_nothing_and_reads_zero(segments, gate, implementation):
    problems.check_padding(OP, implementation, dict(segments=segments, gate=gate, batch=3, length=50))


@pytest.mark.deep
@pytest.mark.parametrize("segments", ["packed", "states"])
def test_gradients_do_not_cross_segments(segments):
    problems.check_segment_gradients_apart(OP, "xla", dict(segments=segments, gates="mixed", batch=1))


@pytest.mark.deep
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_causal(gate):
    problems.check_causal(OP, "xla", dict(gate=gate, gates="mixed"), (0, 15, 16, 40, 74))


@pytest.mark.deep
@pytest.mark.parametrize("segments", ["packed", "states"])
def test_causal_when_packed(segments):
    problems.check_causal(OP, "xla", dict(segments=segments, gates="mixed"), (20, 37))


@pytest.mark.deep
@pytest.mark.parametrize("segments", ["one", "states"])
def test_rows_do_not_influence_each_other(segments):
    problems.check_rows_apart(OP, "xla", dict(segments=segments, gates="mixed", batch=3))


@pytest.mark.deep
@pytest.mark.parametrize("gate, cuts", [("none", (1,)), ("scalar", (16, 50)), ("channel", (40,))])
def test_a_cut_anywhere_changes_nothing(gate, cuts):
    problems.check_cuts(OP, "xla", dict(gate=gate), cuts)


@pytest.mark.deep
def test_a_cut_changes_nothing_with_a_state_per_segment():
    problems.check_cuts(OP, "xla", dict(segments="states", batch=3), (33,))


@pytest.mark.deep
def test_token_by_token_equals_one_call():
    problems.check_cuts(OP, "xla", dict(length=5, chunk=2), range(1, 5))


def test_a_segment_start_is_a_gate_of_minus_infinity():
    arrays, static = make_problem(length=40, gates="mixed")
    ids = np.repeat([[0, 1, 5]], [7, 20, 13], axis=1).astype(np.int32).repeat(2, axis=0)
    packed = values(OP, arrays, static | {"segment_ids": ids})
    assert_close(values(OP, arrays | {"g": arrays["g"].at[:, np.array([7, 27])].set(-jnp.inf)}, static), packed, 1e-14)


def test_reductions():
    """A gate per channel that is the same in all is a gate per head; a gate of zero is none."""
    arrays, static = make_problem(gate="scalar")
    wide = arrays | {"g": jnp.repeat(arrays["g"][..., None], 8, axis=-1)}
    assert_close(values(OP, wide, static), values(OP, arrays, static))
    zero = arrays | {"g": jnp.zeros_like(arrays["g"])}
    assert_close(values(OP, zero, static), values(OP, arrays | {"g": None}, static))


def test_no_gate_is_causal_attention_without_softmax():
    arrays, static = make_problem(gate="none", groups=2, state=False)
    q, k, v = (np.asarray(arrays[name]) for name in "qkv")
    scores = np.tril(np.einsum("bihk,bjhk->bhij", q, k)) * 0.5
    wanted = np.einsum("bhij,bjhv->bihv", np.repeat(scores, 2, axis=1), v)
    out, _ = values(OP, arrays, static, scale=0.5)
    np.testing.assert_allclose(out, wanted, rtol=1e-12, atol=1e-12)


def test_long_run_at_extreme_gates_stays_finite():
    """12,000 tokens, bfloat16, gates from 0 to -50 and resets: finite values and gradients."""
    arrays, static = make_problem(batch=1, heads=1, length=12_000, chunk=64, gate="channel", value=4)
    arrays = problems.in_dtype(arrays, jnp.float32, tokens=jnp.bfloat16)
    for leaf in jax.tree.leaves(values_and_grads(OP, arrays, static)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


def forward_and_backward(length, gate, jit):
    """Returns the compiled program for tokens of 2 heads with K = V = 64, and its arguments."""
    rng = np.random.default_rng(0)
    shapes = [(1, length, 2, 64)] * 3 + [(1, length, 2) if gate == "scalar" else (1, length, 2, 64)]
    args = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    args[3] = -jnp.abs(args[3])

    def pull(q, k, v, g):
        result, vjp = jax.vjp(lambda *args: linear_attention(*args[:3], g=args[3], implementation="xla"), q, k, v, g)
        return result, vjp(result)

    return jit(pull).lower(*args).compile(), args


@pytest.mark.parametrize("gate", ["scalar", pytest.param("channel", marks=pytest.mark.deep)])
def test_temporary_memory_grows_with_the_length_alone(gate):
    """Linear in T, and far below a state per token: T x K x V numbers per head."""
    programs = (forward_and_backward(length, gate, problems.compiled)[0] for length in (4096, 16384))
    short, long = (program.memory_analysis().temp_size_in_bytes for program in programs)
    assert long <= 4.1 * short
    assert long < 0.1 * 16384 * 64 * 64 * 2 * 4


@pytest.mark.deep
def test_time_per_token_does_not_grow_with_the_length():
    programs = {length: forward_and_backward(length, "scalar", jax.jit) for length in (2048, 16384)}
    seconds = dict.fromkeys(programs, np.inf)
    for _ in range(12):  # the fastest of many, and processor time: other processes may be at work
        for length, (program, args) in programs.items():
            start = time.process_time()
            jax.block_until_ready(program(*args))
            seconds[length] = min(seconds[length], time.process_time() - start)
    assert seconds[16384] / 16384 < 1.3 * seconds[2048] / 2048


@pytest.mark.deep
def test_no_collective_under_a_mesh(run_python):
    assert "no collectives" in run_python(textwrap.dedent(problems.MESH_PROGRAM), args=(OP,), devices=8)


def test_vmap_equals_a_loop():
    made = [make_problem(seed=seed, length=20, gate="channel") for seed in (0, 1)]
    static = made[0][1]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(arrays for arrays, _ in made))
    gradient = jax.grad(lambda arrays: jnp.sum(call(OP, arrays, static)[0] ** 2))
    looped = jax.tree.map(lambda *x: jnp.stack(x), *(problems.compiled(gradient)(arrays) for arrays, _ in made))
    assert_close(problems.compiled(jax.vmap(gradient))(stacked), looped)


def test_cost_counts_the_matrix_products():
    """One chunk, so that XLA's own count sees every product; XLA also counts elementwise work."""
    sizes = dict(batch=2, seq=64, heads=4, query_heads=2, key=64, value=96)
    plan = LogDecayPlan(64, 1.0)
    q, v = jnp.ones((2, 64, 2, 64)), jnp.ones((2, 64, 4, 96))
    inputs = LinearInputs(q, q, v, None, jnp.ones((2, 4, 64, 96)), None)
    counted = cost.flops(**sizes)
    cotangents = (v, inputs.state)
    forward = jax.jit(lambda inputs: xla.forward(plan, inputs)[0])
    backward = jax.jit(lambda inputs: xla.backward(plan, inputs, (), cotangents))
    unneeded = 2 * 2 * 64 * 4 * 64 * 96  # no gradient passes through the state after the only chunk, so it is dropped
    for program, wanted in ((forward, counted.forward), (backward, counted.backward - unneeded)):
        assert 0.93 < wanted / program.lower(inputs).compile().cost_analysis()["flops"] < 1.0
    # 2C(K + V) + 4KV operations for e(2K + 2V) + 4 bytes, and the state in and out
    plain = dict(batch=1, seq=64, heads=1, key=128, value=128)
    assert cost.flops(**plain).forward == 64 * (2 * 64 * 256 + 4 * 128 * 128)
    assert cost.traffic_bytes(**plain).forward == 64 * (2 * 512 + 4) + 2 * 4 * 128 * 128
    assert cost.traffic_bytes(**plain).backward == 64 * (2 * 7 * 128 + 8) + 4 * 4 * 128 * 128


BAD = [
    (dict(q=np.zeros((2, 75, 2))), "q has shape"),
    (dict(q=np.zeros((2, 0, 2, 8))), r"q has shape \(2, 0, 2, 8\), wanted \[B, T, H, K\], every axis at least 1"),
    (dict(k=np.zeros((2, 74, 2, 8))), r"k has shape \(2, 74, 2, 8\), wanted \[B, T, H, K\] = \(2, 75, 2, 8\)"),
    (dict(q=np.zeros((2, 75, 2, 8), np.int32)), "q has dtype int32, wanted a floating-point dtype"),
    (dict(v=np.zeros((2, 75, 3, 6))), "v has 3 heads, wanted a multiple of the 2 heads of q and k"),
    (dict(g=np.zeros((2, 75))), r"g has shape \(2, 75\), wanted \[B, T, HV\] or \[B, T, HV, K\]"),
    (dict(g=np.zeros((2, 75, 4))), r"g has shape \(2, 75, 4\), wanted \[B, T, HV\] = \(2, 75, 2\)"),
    (dict(g=np.zeros((2, 75, 2, 6))), r"g has shape \(2, 75, 2, 6\), wanted \[B, T, HV, K\] = \(2, 75, 2, 8\)"),
    (dict(g=0.5), "g must be an array"),
    (dict(initial_state=np.zeros((2, 2, 6, 8))), r"initial_state has shape .* wanted \[B, HV, K, V\] = \(2, 2, 8, 6\)"),
    (dict(segment_ids=np.zeros((2, 74), np.int32)), "segment_ids has shape"),
    (dict(segment_ids=np.zeros((2, 75))), "segment_ids has dtype float64, wanted an integer dtype"),
    (dict(num_segments=3), "num_segments needs segment_ids"),
    (dict(num_segments=0, segment_ids=np.zeros((2, 75), np.int32)), "num_segments is 0, wanted an integer"),
    (dict(num_segments=3, segment_ids=np.zeros((2, 75), np.int32)), r"initial_state .* \[B, N, HV, K, V\]"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(scale="1"), "scale is '1', wanted a number or None"),
    (dict(implementation="palas_gpu"), "unknown implementation 'palas_gpu'; did you mean 'pallas_gpu'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(change, message):
    arrays, static = make_problem()
    with pytest.raises(ValueError, match=message):
        call(OP, arrays | change, static if "chunk_size" not in change else {})


def test_kernels_that_cannot_run_say_why():
    names, missing = available(OP)
    assert names[:2] == ("reference", "xla")
    arrays, static = make_problem()
    for name in missing:
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: .*; use 'xla' or None."):
            call(OP, arrays, static, implementation=name)
