"""The TPU kernels without a TPU: interpreted against float64 and the XLA forms, and lowered for TPU by their names.

Interpretation raises at reads out of bounds and has memory start as NaN; once per kernel it also looks for races.
Whether the programs compile for the machine is what `make test-compile` checks.
"""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import dispatch
from engrax.pallas_kernels.common.log_decay import LogDecayShapes
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, interpreted_kernels
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS, with_derivatives
from engrax.tests import neural_memory_problems, op_problems

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)
SLACK, FLOAT32_ERROR = 1.5, 1e-5  # a kernel's error may be that many times the XLA form's, or that


@pytest.fixture(params=[False], ids=[""])
def interpreted(request, capfd):
    """Interprets kernels, with race detection where the test asks for it."""
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(detect_races=request.param, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with interpreted_kernels(), pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out  # older versions only print it


with_races = pytest.mark.parametrize("interpreted", [True], ids=["races"], indirect=True)


def deep(*values):
    return pytest.param(*values, marks=pytest.mark.deep)


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


def with_gradients(function, arrays):
    """Returns (outputs, gradients of a random weighting of the outputs by every array)."""

    @jax.jit
    def run(arrays):
        outputs, pull = jax.vjp(function, arrays)
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), outputs)
        return outputs, pull(weights)[0]

    return run(arrays)


def doubles(function, arrays):
    """Returns `with_gradients` in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        arrays = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), arrays)
        return jax.tree.map(np.asarray, with_gradients(function, arrays))


def assert_as_accurate(kernel, xla, truth, most, floor=FLOAT32_ERROR):
    """Every array of the kernel is about as near to the truth as the XLA form's, which is within `most`.

    floor: the error that a kernel may have in any case.
    """
    own, others = op_problems.relative_rms(kernel, truth), op_problems.relative_rms(xla, truth)
    for (path, error), other in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(others), strict=True):
        name = jax.tree_util.keystr(path)
        assert other <= most, f"{name}: the XLA form errs by {other}"
        assert error <= max(SLACK * other, floor), f"{name}: the kernel errs by {error}, the XLA form by {other}"
    dtypes = [[x.dtype for x in jax.tree.leaves(tree)] for tree in (kernel, xla)]
    assert dtypes[0] == dtypes[1]


# ---------------------------------------------------------------------------------------------------------------------
# linear_attention and gated_delta_rule


def call(op, static, implementation):
    """Returns the operation as a function of the dict of its arrays."""
    function = getattr(importlib.import_module(f"engrax.pallas_kernels.{op}.api"), op)

    def run(arrays):
        rest = {name: x for name, x in arrays.items() if name not in "qkv"}
        return function(*(arrays[name] for name in "qkv"), **rest, **static, implementation=implementation)

    return run


def check(op, dtype, case):
    with jax.enable_x64(True):
        arrays, static = op_problems.make_problem(op, **case)
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)
    arrays |= {name: np.asarray(jnp.asarray(arrays[name], dtype)) for name in "qkv"}
    truth = doubles(call(op, static, "reference"), arrays)
    kernel, xla = (with_gradients(call(op, static, name), arrays) for name in ("pallas_tpu", "xla"))
    assert_as_accurate(kernel, xla, truth, 0.02 if dtype == jnp.bfloat16 else 1e-4)


SMALL = dict(batch=2, length=44, heads=1, groups=2, key=8, value=16, chunk=16)


@pytest.mark.parametrize(
    "op, dtype, case",
    [
        ("linear_attention", jnp.bfloat16, SMALL | dict(gate="channel", batch=1)),
        deep("gated_delta_rule", jnp.bfloat16, SMALL | dict(gate="channel", batch=1)),
        long("linear_attention", jnp.float32, SMALL | dict(gate="none", state=False)),
        long("linear_attention", jnp.float32, SMALL | dict(gate="scalar", segments="packed")),
        deep("linear_attention", jnp.float32, SMALL | dict(gate="channel", segments="states", length=75)),
        long("linear_attention", jnp.bfloat16, SMALL | dict(gate="channel", chunk=32, length=64)),
        long("linear_attention", jnp.bfloat16, SMALL | dict(gate="scalar", chunk=48, length=96, groups=1)),
        long("linear_attention", jnp.float32, SMALL | dict(gate="scalar", length=300, groups=1)),  # groups of chunks
        long("gated_delta_rule", jnp.float32, SMALL | dict(gate="none", keys="identical", state=False)),
        deep("gated_delta_rule", jnp.float32, SMALL | dict(gate="scalar", keys="correlated", segments="packed")),
        long("gated_delta_rule", jnp.float32, SMALL | dict(gate="channel", keys="correlated", segments="states")),
        long("gated_delta_rule", jnp.bfloat16, SMALL | dict(gate="channel", chunk=32, length=64)),
        long("gated_delta_rule", jnp.bfloat16, SMALL | dict(gate="scalar", chunk=48, length=96, groups=1)),
        long("gated_delta_rule", jnp.float32, SMALL | dict(gate="scalar", length=300, groups=1)),
    ],
)
def test_as_accurate_as_xla(op, dtype, case, interpreted):
    check(op, dtype, case)


@with_races
@pytest.mark.parametrize(
    "op",
    [
        pytest.param("linear_attention", marks=pytest.mark.long),
        pytest.param("gated_delta_rule", marks=pytest.mark.deep),
    ],
)
def test_no_races(op, interpreted):
    """Ten chunks and a last group that is short, states of segments, a query head for two value heads."""
    check(op, jnp.float32, SMALL | dict(batch=1, length=100, gate="scalar", segments="states", keys="correlated"))


@pytest.mark.parametrize(
    "gate, devices",
    [("scalar", 1), ("scalar", 8), ("channel", 1), deep("channel", 8), deep("none", 1), deep("none", 8)],
)
@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
def test_lowers_for_tpu(op, gate, devices):
    """Chosen by platform, also where a mesh splits rows and heads: the kernels, and no loop over chunks."""
    with jax.enable_x64(True):
        case = dict(batch=8, length=64, heads=2, groups=1, key=16, value=16, gate=gate)
        arrays, static = op_problems.make_problem(op, **case)
    arrays = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in arrays.items()}
    text = lower_gradient(call(op, static, None), arrays, devices)
    assert kernel_names(text) == {f"{op}_{kernel}" for kernel in ("forward", "backward_states", "backward")}
    assert "stablehlo.while" not in text


def lower_gradient(function, arrays, devices):
    """Returns the text of the gradient's program for TPU, under a mesh of as many devices."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    def total(arrays):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(function(arrays)))

    shape, names = ((4, 2), ("data", "tensor")) if devices == 8 else ((), ())
    device = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    mesh = AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(names), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(total)).trace(arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert ("sdy.manual_computation" in text) == (devices == 8)
    return text


def kernel_names(text):
    calls = re.findall(r"custom_call @(\w+)\(.*?kernel_name = \"(\w+)\"", text)
    return {name for target, name in calls if target == "tpu_custom_call"}


@pytest.mark.parametrize("op", ["linear_attention", "gated_delta_rule"])
def test_what_the_kernels_cannot_serve_is_said(op):
    unsupported = dispatch.implementation(op, "pallas_tpu").supports
    fine = LogDecayShapes(2, 128, 2, 4, 64, 128, 64, np.dtype(jnp.bfloat16), "channel", True)
    for gate in ("none", "scalar", "channel"):
        assert unsupported(fine._replace(gate=gate)) is None
    for change, word in (
        (dict(dtype=np.dtype(np.float64)), "float64"),
        (dict(dtype=np.dtype(np.float16)), "float16"),
        (dict(chunk=24), "not 24"),
        (dict(chunk=512), "not 512"),
        (dict(key=1024), "not 1024 and 128"),
    ):
        assert word in unsupported(fine._replace(**change))


# ---------------------------------------------------------------------------------------------------------------------
# neural_memory


def neural_memory(static, implementation, **options):
    """Returns the operation as a function of the dict of its arrays."""

    def run(arrays):
        out, state = neural_memory_problems.call(arrays, static, implementation=implementation, **options)
        return out, state[:3]

    return run


def check_neural_memory(case, **options):
    with jax.enable_x64(True):
        arrays, static = neural_memory_problems.make_problem(**case)
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float32), arrays)
    truth = doubles(neural_memory(static, "reference", **options), arrays)
    kernel, xla = (with_gradients(neural_memory(static, name, **options), arrays) for name in ("pallas_tpu", "xla"))
    assert_as_accurate(kernel, xla, truth, 1e-5, floor=5e-7)


@pytest.mark.parametrize(
    "case, options",
    [
        long(dict(depth=1, batch=1, heads=2, length=20, chunk=8), dict()),
        deep(dict(depth=2, batch=2, heads=1, length=21, chunk=6, segments=True), dict(save_every=3)),
        long(dict(depth=1, batch=2, heads=1, length=30, chunk=8, segments=True), dict(gradient_at="decayed")),
        long(dict(depth=2, batch=2, heads=1, length=21, chunk=4), dict(activation="silu", save_every=2)),
        long(dict(depth=2, batch=2, heads=1, length=1, chunk=8, rows="phased"), dict(activation="relu")),
        long(dict(depth=2, batch=1, heads=1, length=70, chunk=16, rows="phased"), dict(activation="tanh")),
        long(dict(seed=5, depth=2, batch=3, heads=1, length=33, chunk=6, rows="phased", segments=True), dict()),
    ],
)
def test_neural_memory_is_as_accurate_as_xla(case, options, interpreted):
    check_neural_memory(case, **options)


@with_races
@pytest.mark.parametrize(
    "case, options",
    [
        (dict(depth=1, batch=2, length=20, chunk=8), dict(gradient_at="decayed")),
        pytest.param(
            dict(depth=2, batch=3, length=15, chunk=6, rows="phased", segments=True),
            dict(save_every=2),
            marks=pytest.mark.long,
        ),
    ],
    ids=["one layer", "two layers, rows at phases, segments"],
)
def test_neural_memory_without_races(case, options, interpreted):
    """Segments begin in a row's last block too; two groups of blocks."""
    check_neural_memory(case | dict(heads=1), **options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_activations_do_not_cancel(activation):
    """Float32 errs by a few roundings even where the activation is saturated; through tanh, gelu errs far more."""
    x = np.linspace(-12, 12, 4001).astype(np.float32)
    f = ACTIVATIONS[activation]
    first = jax.vmap(jax.grad(f))
    with jax.enable_x64(True):
        truth = [jax.jit(g)(x.astype(np.float64)) for g in (f, first, jax.vmap(jax.grad(jax.grad(f))))]
    for g, wanted in zip(with_derivatives(activation), truth, strict=True):
        np.testing.assert_allclose(jax.jit(g)(x), wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("segments, devices", [(False, 1), (True, 8), deep(False, 8), deep(True, 1)])
def test_neural_memory_lowers_for_tpu(segments, devices):
    rows = "phased" if segments else "aligned"
    arrays, static = neural_memory_problems.make_problem(batch=8, length=16, chunk=8, rows=rows, segments=segments)
    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), arrays)
    text = lower_gradient(neural_memory(static, None, save_every=2), arrays, devices)
    assert kernel_names(text) == {"neural_memory_forward", "neural_memory_backward"}
    assert "stablehlo.while" not in text


def test_what_the_neural_memory_kernel_cannot_serve_is_said():
    from engrax.pallas_kernels.neural_memory.tpu import MemoryShapes, unsupported

    float32 = np.dtype(np.float32)
    sizes = dict(layers=((64, 256), (256, 64)), slots=64, group=4, batch=2, heads=2, blocks=8)
    fine = MemoryShapes(dtype=float32, tokens=float32, aligned=True, segments=False, **sizes)
    assert unsupported(fine) is None and unsupported(fine._replace(layers=((128, 128),))) is None
    for change, word in (
        (dict(dtype=np.dtype(np.float64)), "float64"),
        (dict(slots=256), "not 256"),
        (dict(layers=((64, 64),) * 3), "not 3"),
        (dict(layers=((512, 2048), (2048, 512))), "MiB of VMEM"),
        (dict(group=1000), "MiB of VMEM"),
    ):
        assert word in unsupported(fine._replace(**change))
