"""The Mosaic GPU kernels without a GPU: interpreted against float64 and the XLA forms, and lowered by their names.

Interpretation checks the numbers and, with its race detector and poisoned memory, the copies. Whether the programs
compile for the machine, and without spilling registers, is what `make test-compile` checks.
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels.common.log_decay import LogDecayShapes
from engrax.pallas_kernels.common.segments import max_chunks
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, interpreted_kernels
from engrax.pallas_kernels.neural_memory.types import MemoryShapes
from engrax.tests import neural_memory_problems, op_problems

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)
SLACK, FLOOR, MOST = 1.5, 1e-5, 0.03  # a kernel may err that many times as much as the XLA form, which stays below MOST
OPS = ("linear_attention", "gated_delta_rule")
KERNELS = {
    "linear_attention": ("forward", "backward_dq", "backward_dk", "backward_dv"),
    "gated_delta_rule": (
        "inverse",
        "forward",
        "backward_states",
        "backward_dv",
        "backward_dq",
        "backward_dk",
        "backward_dk_of_keys",
    ),
}
WALKS = ("forward_tokens", "forward", "backward_tokens", "backward_states", "backward_dv", "backward_dqk")
BY_CHANNEL = {"linear_attention": WALKS, "gated_delta_rule": (*WALKS, "backward_dk")}


def deep(op, **case):
    return pytest.param(op, case, marks=pytest.mark.deep)


def long(op, **case):
    return pytest.param(op, case, marks=pytest.mark.long)


def problem(op, **case):
    """Returns (arrays as a call with bfloat16 tokens gets them, static)."""
    defaults = dict(batch=1, heads=1, key=64, value=64, chunk=64, length=128)
    with jax.enable_x64(True):
        arrays, static = op_problems.make_problem(op, **{**defaults, **case})
        arrays = {name: np.asarray(x, np.float32) for name, x in arrays.items()}
    return op_problems.in_dtype(arrays, jnp.float32, tokens=jnp.bfloat16), static


def run(op, arrays, static, implementation):
    """Returns ((out, final state), gradients of a random weighting of both)."""
    with interpreted_kernels():
        return op_problems.values_and_grads(op, arrays, static, implementation=implementation)


def truth(op, arrays, static):
    with jax.enable_x64(True):
        doubles = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        return jax.tree.map(np.asarray, run(op, doubles, static, "reference"))


CASES = [
    ("linear_attention", dict(groups=2, length=150, gates="mixed")),
    long("linear_attention", key=128, gates="zero"),
    long("linear_attention", value=128, gate="none"),
    deep("gated_delta_rule", gates="zero", keys="correlated"),
    ("linear_attention", dict(gate="channel", gates="mixed")),
    deep("gated_delta_rule", gate="channel", gates="mixed", keys="correlated"),
    long("linear_attention", key=128, value=128, groups=2, gates="reset"),
    long("linear_attention", key=128, value=128, gate="none", heads=2, length=200),
    long("linear_attention", value=128, gates="zero", batch=2, heads=2, groups=2, segments="packed"),
    long("linear_attention", key=128, gate="none", length=64, state=False),
    long("linear_attention", gates="mixed", length=1024),
    long("linear_attention", gates="zero", length=1024),
    long("gated_delta_rule", key=128, gate="none"),
    long("gated_delta_rule", groups=2, gates="mixed", keys="correlated"),
    long("gated_delta_rule", key=128, value=128, groups=2, gates="reset"),
    long("gated_delta_rule", value=128, gates="zero", batch=2, heads=2, length=150, segments="packed"),
    long("gated_delta_rule", gate="none", keys="identical", length=64, state=False),
    long("gated_delta_rule", gates="mixed", length=1024),
    long("linear_attention", gate="channel", key=128, value=128, groups=2, gates="reset", length=150),
    long("linear_attention", gate="channel", value=128, batch=2, heads=2, groups=2, gates="zero", segments="packed"),
    long("linear_attention", gate="channel", key=128, gates="mixed", length=64, state=False),
    long("linear_attention", gate="channel", gates="mixed", length=1024),
    long("linear_attention", gate="channel", gates="zero", length=1024),
    long("gated_delta_rule", gate="channel", key=128, value=128, groups=2, gates="reset", length=150),
    long("gated_delta_rule", gate="channel", value=128, batch=2, heads=2, gates="zero", segments="packed"),
    long("gated_delta_rule", gate="channel", key=128, gates="mixed", keys="identical", length=64, state=False),
    long("gated_delta_rule", gate="channel", gates="zero", keys="correlated"),
    long("gated_delta_rule", gate="channel", gates="mixed", length=1024),
    # Widths that are padded or split: Based's 153 and 65, gated DeltaNet's V of 256, GSA's and Infini's.
    ("linear_attention", dict(key=153, value=65, gate="none", length=64)),
    long("gated_delta_rule", value=256, gates="mixed", keys="correlated"),
    long("linear_attention", key=153, value=65, gates="mixed", groups=2, segments="packed", batch=2, length=150),
    long("linear_attention", key=320, value=192, gates="mixed", heads=2),
    long("linear_attention", gate="channel", key=36, value=256, gates="mixed", groups=2, length=150),
    long("gated_delta_rule", key=36, value=20, gates="mixed", groups=2, length=150),
    long("gated_delta_rule", key=128, value=256, gates="reset", heads=2, groups=2, segments="packed", batch=2),
    long("gated_delta_rule", gate="channel", key=100, value=192, gates="mixed", keys="correlated", heads=2),
    # One state per segment.
    ("linear_attention", dict(segments="few", gates="mixed", length=100)),
    deep("gated_delta_rule", segments="few", gates="mixed", value=256, length=100),
    long("linear_attention", gate="channel", segments="few", gates="mixed", length=100),
    long("linear_attention", segments="states", gates="mixed", batch=2, length=150),
    long("linear_attention", segments="few", gate="none", key=153, value=65, batch=2, length=150),
    long("gated_delta_rule", segments="states", gates="mixed", batch=2, length=150),
    long("gated_delta_rule", segments="few", gates="mixed", key=128, value=256, groups=2, batch=2, length=150),
    long("gated_delta_rule", segments="states", gate="none", keys="correlated", heads=2, batch=3, length=100),
    long("gated_delta_rule", segments="states", gate="channel", gates="mixed", value=192, batch=2, length=150),
    long("linear_attention", segments="few", gates="zero", batch=2, length=400),
    long("gated_delta_rule", segments="few", gates="mixed", keys="correlated", batch=2, length=400),
    long("gated_delta_rule", segments="few", gate="channel", gates="mixed", batch=2, length=400),
]


@pytest.mark.parametrize("op, case", CASES)
def test_a_kernel_is_as_accurate_as_the_xla_form(op, case):
    arrays, static = problem(op, **case)
    kernel, xla = (run(op, arrays, static, name) for name in ("pallas_gpu", "xla"))
    assert [x.dtype for x in jax.tree.leaves(kernel)] == [x.dtype for x in jax.tree.leaves(xla)]
    wanted = truth(op, arrays, static)
    own, others = (op_problems.relative_rms(got, wanted) for got in (kernel, xla))
    for (path, error), other in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(others), strict=True):
        name = jax.tree_util.keystr(path)
        assert other <= MOST, f"{name}: the XLA form errs by {other}"
        assert error <= max(SLACK * other, FLOOR), f"{name}: the kernel errs by {error}, the XLA form by {other}"


@pytest.mark.parametrize(
    "op, gate",
    [
        ("linear_attention", "scalar"),
        pytest.param("gated_delta_rule", "scalar", marks=pytest.mark.long),
        pytest.param("linear_attention", "channel", marks=pytest.mark.long),
        pytest.param("gated_delta_rule", "channel", marks=pytest.mark.long),
    ],
)
def test_a_gate_that_cuts_has_no_gradient_and_lets_nothing_through(op, gate):
    arrays, static = problem(op, gates="mixed", gate=gate)
    arrays["g"] = arrays["g"].at[:, 100].set(-jnp.inf)
    (out, _), gradients = run(op, arrays, static, "pallas_gpu")
    assert (gradients["g"][0, 100, 0] == 0).all() and np.isfinite(gradients["g"]).all()
    (other, _), _ = run(op, arrays | {"v": arrays["v"].at[:, :100].multiply(-2)}, static, "pallas_gpu")
    np.testing.assert_array_equal(out[:, 100:], other[:, 100:])
    assert np.any(out[:, :100] != other[:, :100])


SEGMENTS = dict(length=100, value=256, segments="few")


@pytest.mark.parametrize("gate", ["scalar", pytest.param("channel", marks=pytest.mark.long)])
@pytest.mark.parametrize("case", [dict(key=128, length=192), pytest.param(SEGMENTS, marks=pytest.mark.long)])
@pytest.mark.parametrize("op", OPS)
def test_no_race_and_nothing_read_before_it_is_written(op, case, gate):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays, static = problem(op, gate=gate, gates="mixed", **case)
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params):
        results = run(op, arrays, static, "pallas_gpu")
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(results))


def test_every_chunk_is_one_segments_and_blocks_lose_nothing():
    from engrax.pallas_kernels.common.segments import aligned_layout
    from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
    from engrax.pallas_kernels.mosaic_gpu import widths

    arrays, static = problem("linear_attention", batch=3, heads=2, groups=2, key=70, value=300, segments="states")

    @op_problems.compiled
    def there_and_back(arrays, ids):
        layout = aligned_layout(ids, static["num_segments"], 64)
        inputs = LinearInputs(*(arrays[name] for name in "qkv"), None, arrays["initial_state"], layout)
        blocks = widths.to_blocks(inputs)
        return inputs, blocks, widths.gradients_from_blocks(blocks, inputs)

    inputs, blocks, again = there_and_back(arrays, static["segment_ids"])
    assert [blocks.q.shape[2:], blocks.v.shape[2:], blocks.state.shape[1:]] == [(2, 128), (20, 64), (20, 128, 64)]
    for got, wanted in zip((*again[:3], again.state), (*inputs[:3], inputs.state)):
        np.testing.assert_array_equal(got, wanted)
    for bounds, segments in zip(np.asarray(blocks.bounds), np.asarray(inputs.layout.segment)):
        np.testing.assert_array_equal(np.repeat(np.arange(static["num_segments"]), np.diff(bounds)), segments)
        assert bounds[0] == 0 and bounds[-1] == len(segments)


def abstract_h200(shape=(), names=()):
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize(
    "devices, implementation, case, gate",
    [
        (8, None, {}, "scalar"),
        pytest.param(8, None, {}, "channel", marks=pytest.mark.deep),
        pytest.param(1, "pallas_gpu", {}, "scalar", marks=pytest.mark.deep),
        pytest.param(1, "pallas_gpu", {}, "channel", marks=pytest.mark.deep),
        pytest.param(8, None, SEGMENTS, "scalar", marks=pytest.mark.deep),
        pytest.param(8, None, SEGMENTS, "channel", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_an_h200_gets_the_kernels_and_no_loop(op, devices, implementation, case, gate):
    arrays, static = problem(op, batch=8, heads=2, gate=gate, **case)
    slots = 64 * max_chunks(arrays["q"].shape[1], 64, static.get("num_segments"))
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def loss(arrays):
        out, final = op_problems.call(op, arrays, static, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(final**2)

    with abstract_h200(*(((2, 2, 2), ("data", "fsdp", "tensor")) if devices == 8 else ())):
        text = jax.jit(jax.grad(loss)).trace(specs).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(mosaic_gpu\w*)\((.*)", text)
    names = (BY_CHANNEL if gate == "channel" else KERNELS)[op]
    assert len(calls) == len(names) and len(calls) == text.count("custom_call @mosaic")
    assert set(re.findall(rf'"?({op}_(?:[a-z]+_)*[a-z]+?)_mosaic_gpu', text)) == {f"{op}_{name}" for name in names}
    assert "stablehlo.while" not in text
    rows, heads = (2, 1) if devices == 8 else (8, 2)
    assert all(f"tensor<{rows}x{slots}x{heads}x64xbf16>" in rest for _, rest in calls)


@pytest.mark.parametrize("op", OPS)
def test_what_the_kernel_cannot_serve_is_said(op):
    unsupported = importlib.import_module(f"engrax.pallas_kernels.{op}.gpu").unsupported
    fine = LogDecayShapes(2, 128, 2, 4, 64, 128, 64, np.dtype(jnp.bfloat16), "scalar", 0)
    assert all(unsupported(fine._replace(gate=gate)) is None for gate in ("none", "scalar", "channel"))
    assert unsupported(fine._replace(key=20, value=300, segments=5)) is None
    for change, word in (
        (dict(dtype=np.dtype(np.float32)), "float32"),
        (dict(key=129, gate="channel"), "K of at most 128, not 129: a state of 192 x 64 float32 takes 96 of a"),
        (dict(chunk=16, length=16), "not 16"),
        (dict(heads=70000), "65535"),
        (dict(heads=20000, value=512), "heads times blocks of 128 values, not 2 and 80000"),
        (dict(batch=20000, segments=4), "65535 states and as many heads times blocks of 128 values, not 80000 and 4"),
    ):
        assert word in unsupported(fine._replace(**change))
    wide = unsupported(fine._replace(key=129))
    assert wide is None if op == "linear_attention" else "not 129" in wide


# ---------------------------------------------------------------------------------------------------------------------
# neural_memory. Its XLA form computes in float32: what the kernel is compared with is that form's program with every
# operand of a product rounded to bfloat16.


def memory_problem(keys="random", gates="exact", **case):
    """Returns (arrays as a call with bfloat16 tokens gets them, static): keys and queries of unit norm, a stable lr.

    gates: "exact" (0 and 1 among them: every chunk forgets everything) or "lasting" (what is written stays for chunks).
    """
    defaults = dict(depth=1, batch=1, heads=1, key=64, value=64, chunk=64, length=128)
    with jax.enable_x64(True):
        arrays, static = neural_memory_problems.make_problem(**{**defaults, **case})
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)
    if gates == "lasting":
        arrays |= dict(forget=arrays["forget"] * 0.01, momentum=0.7 * arrays["momentum"], lr=arrays["lr"] * 0.2)
    if keys == "identical":
        arrays["k"] = np.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
    for name in "qk":
        arrays[name] = arrays[name] / np.linalg.norm(arrays[name], axis=-1, keepdims=True)
    arrays["lr"] = arrays["lr"] * (20 / 64)
    return arrays | {name: jnp.asarray(arrays[name], jnp.bfloat16) for name in "qkv"}, static


def memory_program(static, **options):
    """Returns the function of the arrays that gives ((out, final matrices), gradients of a random weighting of both).

    The weights are numbers of bfloat16, so that no precision of the output rounds them.
    """

    def both(arrays):
        def run(arrays):
            out, state = neural_memory_problems.call(arrays, static, **options)
            return out, state[:3]

        result, pull = jax.vjp(run, arrays)
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.bfloat16).astype(x.dtype), result)
        return result, pull(weights)[0]

    return both


def with_bfloat16_products(function):
    """Returns the function with the operands of products rounded to bfloat16, but for those of highest precision."""
    from jax.extend import core

    def evaluate(jaxpr, consts, args):
        values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args), strict=True))

        def read(x):
            return x.val if isinstance(x, core.Literal) else values[x]

        for equation in jaxpr.eqns:
            inputs, params = [read(x) for x in equation.invars], equation.params
            inner = params["branches"][-1] if "branches" in params else params.get("jaxpr", params.get("call_jaxpr"))
            if inner is not None:  # of the branches by platform any does
                inputs = inputs[1:] if "branches" in params else inputs
                outputs = evaluate(inner.jaxpr, inner.consts, inputs)
            else:
                if equation.primitive.name == "dot_general" and params["precision"] is None:
                    inputs = [jax.lax.reduce_precision(x, 8, 7) for x in inputs]
                outputs = equation.primitive.bind(*inputs, **params)
                outputs = outputs if equation.primitive.multiple_results else [outputs]
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def run(*args):
        with jax.disable_jit():  # loops over chunks become straight-line code
            closed, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        outputs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    return run


@pytest.mark.parametrize(
    "case, options",
    [
        pytest.param(dict(length=128), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=80, rows="phased"), dict(gradient_at="decayed"), marks=pytest.mark.deep),
        pytest.param(dict(length=128, keys="identical"), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=64, key=128), dict(gradient_at="decayed"), marks=pytest.mark.long),
        pytest.param(
            dict(length=150, heads=2, batch=2, value=128),
            dict(gradient_at="decayed", save_every=2),
            marks=pytest.mark.long,
        ),
        pytest.param(dict(length=192, key=128, value=128), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=1000), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=66, batch=2, rows="phased"), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=330, batch=2, rows="phased"), dict(save_every=3), marks=pytest.mark.long),
        pytest.param(dict(length=192, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(length=1000, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(key=128, value=128, length=150, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=128, length=150, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=64, length=256, gates="lasting"), dict(), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=64, length=128), dict(gradient_at="decayed"), marks=pytest.mark.long),
        pytest.param(dict(depth=2, hidden=128, length=192, keys="identical"), dict(), marks=pytest.mark.long),
        pytest.param(
            dict(depth=2, hidden=128, length=330, batch=2, heads=2, rows="phased", gates="lasting"),
            dict(gradient_at="decayed", save_every=3),
            marks=pytest.mark.long,
        ),
        pytest.param(dict(depth=2, hidden=64, length=66, batch=2, rows="phased"), dict(), marks=pytest.mark.deep),
        pytest.param(dict(depth=2, hidden=64, length=1000, gates="lasting"), dict(), marks=pytest.mark.long),
        *(
            pytest.param(
                dict(depth=2, hidden=64, length=192, gates="lasting"), dict(activation=name), marks=pytest.mark.long
            )
            for name in ("silu", "relu", "tanh")
        ),
    ],
)
def test_the_memory_kernel_is_as_accurate_as_the_xla_form_in_bfloat16_and_free_of_races(case, options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays, static = memory_problem(**case)
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with interpreted_kernels(), plgpu.force_gpu_interpret_mode(params):
        kernel = op_problems.compiled(memory_program(static, implementation="pallas_gpu", **options))(arrays)
    xla = memory_program(static, implementation="xla", **options)
    xla = op_problems.compiled(with_bfloat16_products(xla))(arrays)
    assert [x.dtype for x in jax.tree.leaves(kernel)] == [x.dtype for x in jax.tree.leaves(xla)]
    with jax.enable_x64(True):
        doubles = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        reference = memory_program(static, implementation="reference", **options)
        wanted = jax.tree.map(np.asarray, op_problems.compiled(reference)(doubles))
    own, others = (op_problems.relative_rms(got, wanted) for got in (kernel, xla))
    for (path, error), other in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(others), strict=True):
        name = jax.tree_util.keystr(path)
        assert other <= MOST, f"{name}: the XLA form errs by {other}"
        assert error <= max(SLACK * other, FLOOR), f"{name}: the kernel errs by {error}, the XLA form by {other}"


@pytest.mark.parametrize("depth, hidden", [(1, 6), *(pytest.param(2, n, marks=pytest.mark.deep) for n in (64, 128))])
@pytest.mark.parametrize("devices, implementation", [pytest.param(1, "pallas_gpu", marks=pytest.mark.long), (8, None)])
def test_an_h200_gets_the_memory_kernels_and_no_loop(devices, implementation, depth, hidden):
    arrays, static = memory_problem(batch=8, heads=2, depth=depth, hidden=hidden)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def loss(arrays):
        out, final = neural_memory_problems.call(arrays, static, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2) + sum(jnp.sum(x**2) for x in jax.tree.leaves(final[:3]))

    with abstract_h200(*(((2, 2, 2), ("data", "fsdp", "tensor")) if devices == 8 else ())):
        text = jax.jit(jax.grad(loss)).trace(specs).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(mosaic_gpu\w*)\((.*)", text)
    parts = ("forward", "backward_states", "backward_carry", "backward_tokens" if depth == 1 else "backward_reads")
    assert len(calls) == len(parts) and len(calls) == text.count("custom_call @mosaic")
    found = re.findall(r'"?(neural_memory_(?:[a-z]+_)*[a-z]+?)_mosaic_gpu', text)
    assert set(found) == {f"neural_memory_{part}" for part in parts}
    assert "stablehlo.while" not in text
    rows, heads = (2, 1) if devices == 8 else (8, 2)
    assert all(f"tensor<{rows}x128x{heads}x64xbf16>" in rest for _, rest in calls)


def test_what_the_memory_kernel_cannot_serve_is_said():
    unsupported = importlib.import_module("engrax.pallas_kernels.neural_memory.gpu").unsupported
    single, half = np.dtype(np.float32), np.dtype(jnp.bfloat16)
    fine = MemoryShapes(single, ((64, 128),), 64, 1, half, 2, 4, 2, True, False)
    assert unsupported(fine) is None and unsupported(fine._replace(aligned=False, blocks=3)) is None
    assert all(unsupported(fine._replace(layers=((64, size), (size, 64)))) is None for size in (64, 128))
    for change, word in (
        (dict(layers=((64, 64),) * 3), "1 or 2 layers, not 3"),
        (dict(layers=((64, 256), (256, 64))), "not 64, 256 and 64"),
        (dict(layers=((64, 64), (64, 128))), "not 64, 64 and 128"),
        (dict(tokens=single), "bfloat16"),
        (dict(dtype=np.dtype(np.float64)), "float64"),
        (dict(layers=((32, 128),)), "not 32 and 128"),
        (dict(slots=16), "not blocks of 16"),
        (dict(aligned=False), "unknown phases from 66 tokens"),
        (dict(segments=True), "segments"),
        (dict(heads=70000), "65535"),
    ):
        assert word in unsupported(fine._replace(**change))
    arrays, static = memory_problem()
    arrays["v"] = arrays["v"].astype(jnp.float32)
    with interpreted_kernels(), pytest.raises(NotImplementedError, match="takes bfloat16 q, k and v"):
        neural_memory_problems.call(arrays, static, implementation="pallas_gpu")
