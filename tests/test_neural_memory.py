"""The operation `neural_memory`: every implementation against the token-by-token reference, in float64."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import NeuralMemoryState, available
from engrax.pallas_kernels.neural_memory import cost
from engrax.pallas_kernels.neural_memory.grid import aligned_grid, phased_grid
from engrax.tests.neural_memory_problems import (
    assert_close,
    call,
    check_against_reference,
    make_problem,
    make_program,
    values_and_grads,
)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


COVERING = [
    (dict(depth=1, chunk=1, rows="phased", segments=True, length=9), dict()),
    (dict(depth=2, chunk=4, rows="phased", segments=True), dict(gradient_at="decayed", activation="silu")),
]
DEEP = [
    (dict(depth=4, chunk=4, rows="aligned", segments=True), dict()),
    (dict(depth=1, chunk=16, rows="aligned"), dict(gradient_at="decayed", activation="relu")),
    (dict(depth=3, chunk=16, rows="phased", segments=True, length=37), dict(activation="tanh")),
    (dict(depth=2, chunk=64, rows="phased", length=70), dict()),
]


@pytest.mark.parametrize(
    "case, options",
    [*COVERING, *(pytest.param(*case, marks=pytest.mark.deep) for case in DEEP)],
    ids=lambda x: "-".join(map(str, x.values())) if x else "default",
)
def test_xla_equals_reference(case, options):
    check_against_reference(case, **options)


@pytest.mark.long
@pytest.mark.parametrize("gradient_at", ["anchor", "decayed"])
@pytest.mark.parametrize("segments", [False, True], ids=["one", "packed"])
@pytest.mark.parametrize("rows", ["aligned", "phased"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_xla_equals_reference_grid(depth, chunk, rows, segments, gradient_at):
    length = {1: 9, 4: 21, 64: 70}[chunk]
    case = dict(depth=depth, chunk=chunk, rows=rows, segments=segments, length=length)
    check_against_reference(case, every=(1, 2, 5), gradient_at=gradient_at)


@pytest.mark.long
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8, 13])
@pytest.mark.parametrize("rows", ["aligned", "phased"])
def test_xla_equals_reference_at_every_length(length, rows):
    check_against_reference(dict(length=length, rows=rows, segments=True))


def test_gradients_at_exact_gates_equal_finite_differences():
    """Given gates that are exactly 0 or 1 everywhere, then gradients are those of a polynomial in the gates."""
    arrays, static = make_problem(length=7, batch=1, heads=1)

    def total(gates):
        out, state = call(arrays | gates, static)
        return jnp.sum(jnp.sin(out)) + sum(jnp.sum(jnp.sin(m)) for m in jax.tree.leaves(state[:3]))

    run = jax.jit(jax.value_and_grad(total))
    for value in (0.0, 1.0):
        gates = {name: jnp.full_like(arrays[name], value) for name in ("momentum", "forget")}
        gates["lr"] = value * arrays["lr"]
        _, gradient = run(gates)
        for name in gates:
            for t in (0, 3, 6):
                step = jnp.zeros_like(gates[name]).at[0, t, 0].set(1e-5)
                difference = run(gates | {name: gates[name] + step})[0] - run(gates | {name: gates[name] - step})[0]
                assert abs(difference / 2e-5 - gradient[name][0, t, 0]) < 1e-7, (value, name, t)


def slice_tokens(arrays, static, begin, end, state):
    tokens = {name: arrays[name][:, begin:end] for name in ("q", "k", "v", "lr", "momentum", "forget")}
    static = static | {"phase": state.phase}
    if "segment_ids" in static:
        static["segment_ids"] = static["segment_ids"][:, begin:end]
        tokens["reset"] = arrays["reset"]
    return tokens | {"state": state[:3]}, static


def run_in_pieces(arrays, static, cuts, **options):
    state, outs, length = NeuralMemoryState(*arrays["state"], static["phase"]), [], arrays["q"].shape[1]
    for begin, end in zip((0, *cuts), (*cuts, length)):
        out, state = call(*slice_tokens(arrays, static, begin, end, state), **options)
        outs.append(out)
    return jnp.concatenate(outs, axis=1), state


@pytest.mark.parametrize("cut", [1, 4, 10, *(pytest.param(cut, marks=pytest.mark.deep) for cut in (3, 5))])
def test_a_cut_anywhere_changes_nothing(cut):
    arrays, static = make_problem(length=11, rows="phased")
    assert_close(run_in_pieces(arrays, static, (cut,)), call(arrays, static))


@pytest.mark.deep
def test_gradients_pass_through_a_cut():
    arrays, static = make_problem(depth=1, length=9, rows="phased")

    def total(arrays, cuts):
        out, state = run_in_pieces(arrays, static, cuts)
        return jnp.sum(out**2) + sum(jnp.sum(m**3) for m in jax.tree.leaves(state[:3]))

    gradient = jax.jit(jax.grad(total), static_argnums=1)
    assert_close(gradient(arrays, (6,)), gradient(arrays, ()))


def test_token_by_token_equals_one_pass():
    arrays, static = make_problem(length=11, rows="phased", segments=True)
    ids = np.zeros((3, 11), np.int32)
    ids[0, 3:5] = ids[1, :2] = -2  # filler takes a place of the grid, padding at the end takes none
    ids[2, 7:] = -1
    static["segment_ids"] = ids
    assert_close(run_in_pieces(arrays, static, range(1, 11)), call(arrays, static))


def test_one_token_costs_one_slot():
    phase = jnp.arange(3, dtype=jnp.int32)
    assert phased_grid(phase, 1, 64).shape == aligned_grid(3, 1, 64).shape == (1, 1)
    assert phased_grid(phase, 5, 64).shape == (2, 5) and aligned_grid(3, 5, 64).shape == (1, 5)
    assert phased_grid(phase, 128, 64).shape == (3, 64) and aligned_grid(3, 128, 64).shape == (2, 64)


@pytest.mark.parametrize("token", [0, 3, 4, 10, 20])
def test_causal(token):
    """When one token changes, then no output before it changes a bit, and its own does."""
    arrays, static = make_problem(rows="phased")
    run = jax.jit(lambda arrays: call(arrays, static)[0])
    changed = dict(arrays)
    for name in ("q", "k", "v", "lr", "momentum", "forget"):
        changed[name] = arrays[name].at[:, token].add(0.3)
    before, after = np.asarray(run(arrays)), np.asarray(run(changed))
    assert np.array_equal(before[:, :token], after[:, :token])
    assert not np.any(before[:, token] == after[:, token])


def test_rows_do_not_influence_each_other():
    arrays, static = make_problem(rows="phased", segments=True)
    run = jax.jit(lambda arrays: call(arrays, static)[0])
    changed = {name: jax.tree.map(lambda x: x.at[1].multiply(1.7), x) for name, x in arrays.items() if name != "reset"}
    before, after = np.asarray(run(arrays)), np.asarray(run(changed | {"reset": arrays["reset"]}))
    assert np.array_equal(before[[0, 2]], after[[0, 2]])
    assert not np.array_equal(before[1], after[1])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_padding_writes_nothing_and_reads_zero(implementation):
    """Given padding that holds NaN and gates of 1, then state, outputs and gradients are as if it held nothing."""
    arrays, static = make_problem(rows="phased", segments=True)
    padding = static["segment_ids"] < 0
    poisoned = dict(arrays)
    for name, poison in (("q", np.nan), ("k", np.nan), ("v", np.inf), ("lr", 1.0), ("momentum", 0.0), ("forget", 1.0)):
        mask = padding.reshape(padding.shape + (1,) * (arrays[name].ndim - 2))
        poisoned[name] = jnp.where(mask, poison, arrays[name])
    program = make_program(static, implementation=implementation)
    clean, dirty = program(arrays), program(poisoned)
    assert_close(dirty, clean, 1e-14)
    (out, state), phase, gradient = dirty
    assert np.all(np.asarray(out)[padding] == 0) and np.any(np.asarray(out)[~padding] != 0)
    for name in ("q", "k", "v", "lr", "momentum", "forget"):
        assert np.all(np.asarray(gradient[name])[padding] == 0), name
    for new, old in zip(state[0] + state[1], arrays["state"][0] + arrays["state"][1]):
        assert np.array_equal(new[-1], old[-1])  # the last row is all padding
    lengths = [max((t + 1 for t in range(21) if not padding[row, t]), default=0) for row in range(3)]
    assert np.array_equal(phase, (np.asarray(static["phase"]) + lengths) % 4)


def test_packed_segments_equal_segments_apart():
    """A segment packed mid-chunk equals the same segment run from the reset state at phase = its start mod chunk."""
    arrays, static = make_problem(batch=1, length=18, segments=True)
    bounds = (0, 5, 6, 14, 18)
    static["segment_ids"] = np.repeat(np.arange(4), np.diff(bounds))[None].astype(np.int32)
    packed, final = call(arrays, static)
    for segment, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        reset = tuple(tuple(m[None] for m in layers) for layers in arrays["reset"])
        phase = np.full(1, begin % 4, np.int32)
        state = NeuralMemoryState(*reset, reset[0], phase) if segment else NeuralMemoryState(*arrays["state"], phase)
        tokens, options = slice_tokens(arrays, {"chunk_size": 4}, begin, end, state)
        apart, last = call(tokens, options)
        assert_close(packed[:, begin:end], apart)
    assert_close(final, last)


def test_gradients_do_not_cross_segments():
    arrays, static = make_problem(batch=1, length=12, segments=True)
    static["segment_ids"] = np.repeat([0, 1], [5, 7])[None].astype(np.int32)
    gradient = jax.jit(jax.grad(lambda arrays: jnp.sum(call(arrays, static)[0][:, 5:] ** 2)))(arrays)
    for name in ("q", "k", "v", "lr", "momentum", "forget"):
        assert np.all(gradient[name][:, :5] == 0) and np.any(gradient[name][:, 5:] != 0), name
    assert all(np.all(g == 0) for g in jax.tree.leaves(gradient["state"]))
    assert all(np.any(g != 0) for g in jax.tree.leaves(gradient["reset"]))


@pytest.mark.long
def test_save_every_changes_nothing():
    arrays, static = make_problem(rows="phased", segments=True)
    wanted = values_and_grads(arrays, static)
    for save_every in (3, 100):  # groups that do not divide the blocks, and one group longer than all
        assert_close(values_and_grads(arrays, static, save_every=save_every), wanted)


@pytest.mark.deep
def test_save_every_saves_memory():
    arrays, static = make_problem(batch=1, heads=1, length=1024, key=16, value=16, hidden=256, chunk=32)

    def temporaries(save_every):
        gradient = jax.jit(jax.grad(lambda arrays: jnp.sum(call(arrays, static, save_every=save_every)[0])))
        return gradient.lower(arrays).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.7 * temporaries(1)


def test_no_step_is_a_no_op_and_full_forgetting_leaves_the_momentum():
    arrays, static = make_problem()
    still = arrays | {name: jnp.zeros_like(arrays[name]) for name in ("lr", "momentum", "forget")}
    _, state = call(still, static)
    assert_close(state.weights, arrays["state"][0])
    _, state = call(arrays | dict(forget=jnp.ones_like(arrays["forget"])), static)
    assert_close(state.weights, state.momentum)


def test_reduces_to_the_gated_delta_rule():
    """Depth 1, no momentum, chunk 1, gradient at the decayed memory: S = a S + b k^T (v - k a S)."""
    arrays, static = make_problem(depth=1, batch=2, heads=1, chunk=1, length=8)
    arrays["momentum"] = jnp.zeros_like(arrays["momentum"])
    arrays["state"] = (arrays["state"][0], tuple(map(jnp.zeros_like, arrays["state"][1])), arrays["state"][2])
    out, state = call(arrays, static, gradient_at="decayed")
    memory = np.asarray(arrays["state"][0][0])[:, 0]
    q, k, v, lr, forget = (np.asarray(arrays[name])[:, :, 0] for name in ("q", "k", "v", "lr", "forget"))
    for t in range(8):
        memory = (1 - forget[:, t])[:, None, None] * memory
        error = v[:, t] - np.einsum("bi,bio->bo", k[:, t], memory)
        memory = memory + lr[:, t, None, None] * k[:, t, :, None] * error[:, None, :]
        np.testing.assert_allclose(out[:, t, 0], np.einsum("bi,bio->bo", q[:, t], memory), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(state.weights[0][:, 0], memory, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16_inputs_float32_states(implementation):
    arrays, static = make_problem(rows="phased", length=30)
    exact, _ = call(arrays, static)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)
    arrays |= {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in "qkv"}
    (out, state), _, gradient = values_and_grads(arrays, static, implementation=implementation)
    assert out.dtype == jnp.bfloat16 and all(m.dtype == jnp.float32 for m in jax.tree.leaves(state))
    assert gradient["k"].dtype == jnp.bfloat16 and gradient["lr"].dtype == jnp.float32
    assert np.median(np.abs(np.asarray(out, np.float64) - np.asarray(exact))) < 0.02 * np.abs(exact).mean()


@pytest.mark.deep
def test_vmap_equals_a_loop():
    problems = [make_problem(seed, length=6)[0] for seed in (0, 1)]
    static = make_problem(length=6)[1]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *problems)
    gradient = jax.grad(lambda arrays: jnp.sum(call(arrays, static)[0] ** 2))
    looped = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.jit(gradient), problems))
    assert_close(jax.jit(jax.vmap(gradient))(stacked), looped)


@pytest.mark.deep
def test_long_run_in_float32_stays_finite():
    """12,000 tokens at extreme gates, bfloat16 inputs of unit norm: no NaN in values or gradients."""
    arrays, static = make_problem(batch=1, heads=1, length=12_000, chunk=64)
    unit = {name: arrays[name] / jnp.linalg.norm(arrays[name], axis=-1, keepdims=True) for name in "qk"}
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays | unit | {"lr": 0.01 * arrays["lr"]})
    arrays |= {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in "qkv"}
    for leaf in jax.tree.leaves(values_and_grads(arrays, static, save_every=16)):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


BAD = [
    (dict(q=np.zeros((3, 21, 2))), "q has shape"),
    (dict(k=np.zeros((3, 20, 2, 4))), r"k has shape \(3, 20, 2, 4\), wanted \[B, T, H, K\] = \(3, 21, 2, 4\)"),
    (dict(v=np.zeros((3, 21, 1, 5))), "v has shape"),
    (dict(lr=np.zeros((3, 21))), r"lr has shape \(3, 21\), wanted \[B, T, H\] = \(3, 21, 2\)"),
    (dict(momentum=np.zeros((3, 21, 2), np.int32)), "momentum has dtype int32"),
    (dict(forget=0.1), "forget must be an array"),
    (dict(phase=np.zeros(2, np.int32)), "state.phase has shape"),
    (dict(phase=np.zeros(3)), "state.phase has dtype"),
    (dict(segment_ids=np.zeros((3, 21), np.int32)), "segment_ids needs reset"),
    (dict(segment_ids=np.zeros((3, 20), np.int32)), "segment_ids has shape"),
    (dict(reset=((np.zeros((2, 4, 6)),), (np.zeros((2, 4, 6)),))), "reset weights has 1 layers"),
    (dict(activation="gleu"), "did you mean 'gelu'"),
    (dict(gradient_at="start"), "unknown gradient_at 'start'"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(save_every=1.5), "save_every is 1.5"),
    (dict(implementation="xlaa"), "did you mean 'xla'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(change, message):
    arrays, static = make_problem()
    arguments = arrays | static | change
    with pytest.raises(ValueError, match=message):
        call(arguments, {"phase": arguments.pop("phase")})


def test_bad_state_is_named():
    arrays, static = make_problem()
    weights, momentum, anchor = arrays["state"]
    with pytest.raises(ValueError, match=r"state.weights\[1\] has shape .* wanted \[B, H, I, V\]"):
        call(arrays | {"state": (weights[:1] + weights[:1], momentum, anchor)}, static)
    with pytest.raises(ValueError, match="state.momentum has 1 layers, wanted 2"):
        call(arrays | {"state": (weights, momentum[:1], anchor)}, static)


def test_implementations_say_what_they_are():
    names, missing = available("neural_memory")
    assert names == ("reference", "xla") and set(missing) == {"pallas_gpu", "pallas_tpu"}
    arrays, static = make_problem()
    for name in missing:
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: .* use 'xla'"):
            call(arrays, static, implementation=name)
    with pytest.raises(ValueError, match="unknown operation"):
        available("neural_memories")


def test_cost_counts_the_matrix_products():
    """One block, so that XLA's own count sees every product; XLA also counts elementwise work."""
    case = dict(batch=2, length=32, heads=2, key=32, value=32, hidden=64, chunk=32)
    arrays, static = make_problem(**case)
    sizes = dict(batch=2, seq=32, heads=2, key=32, value=32, hidden=64, depth=2, chunk_size=32)
    forward = jax.jit(lambda arrays: jax.tree.leaves(call(arrays, static)))
    gradient = jax.jit(jax.grad(lambda arrays: sum(jnp.sum(x**2) for x in forward(arrays))))
    counted = cost.flops(**sizes)
    for program, wanted in ((forward, counted.forward), (gradient, counted.forward + counted.backward)):
        analysis = program.lower(arrays).compile().cost_analysis()
        assert 0.8 < wanted / analysis["flops"] < 1.02


MESH_PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from engrax.pallas_kernels import NeuralMemoryState, neural_memory
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    B, T, H, K, F = 4, 19, 4, 8, 16
    def shaped(spec, *shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    tokens = [shaped(P("data", None, "tensor"), B, T, H, K) for _ in range(3)]
    gates = [shaped(P("data", None, "tensor"), B, T, H) for _ in range(3)]
    mats = tuple(shaped(P("data", "tensor"), B, H, i, o) for i, o in ((K, F), (F, K)))
    reset = tuple(shaped(P("tensor"), H, i, o) for i, o in ((K, F), (F, K)))
    phase, ids = (shaped(P("data"), *s, dtype=jnp.int32) for s in ((B,), (B, T)))
    def run(tokens, gates, mats, reset, phase, ids):
        state = NeuralMemoryState(mats, mats, mats, phase)
        lr, momentum, forget = gates
        gates = dict(lr=lr, momentum=momentum, forget=forget)
        return neural_memory(*tokens, **gates, state=state, reset=(reset, reset), segment_ids=ids, chunk_size=4)
    def pull(tokens, gates, mats, reset, phase, ids):
        out, vjp = jax.vjp(lambda *a: run(*a, reset, phase, ids)[0], tokens, gates, mats)
        return vjp(out)
    for f in (run, pull):
        text = jax.jit(f).lower(tokens, gates, mats, reset, phase, ids).compile().as_text()
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
            assert name not in text, (f.__name__, name)
    print("no collectives")
"""


@pytest.mark.deep
def test_sharded_over_rows_and_heads_needs_no_collective():
    env = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", textwrap.dedent(MESH_PROGRAM)]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
    assert "no collectives" in done.stdout, done.stderr[-2000:]
