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

from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, Shapes, interpreted_kernels
from engrax.tests import op_problems

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


def slow(op, **case):
    return pytest.param(op, case, marks=pytest.mark.slow)


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
    ("linear_attention", dict(key=128, gates="zero")),
    ("linear_attention", dict(value=128, gate="none")),
    ("gated_delta_rule", dict(gates="zero", keys="correlated")),
    slow("linear_attention", key=128, value=128, groups=2, gates="reset"),
    slow("linear_attention", key=128, value=128, gate="none", heads=2, length=200),
    slow("linear_attention", value=128, gates="zero", batch=2, heads=2, groups=2, segments="packed"),
    slow("linear_attention", key=128, gate="none", length=64, state=False),
    slow("linear_attention", gates="mixed", length=1024),
    slow("linear_attention", gates="zero", length=1024),
    slow("gated_delta_rule", key=128, gate="none"),
    slow("gated_delta_rule", groups=2, gates="mixed", keys="correlated"),
    slow("gated_delta_rule", key=128, value=128, groups=2, gates="reset"),
    slow("gated_delta_rule", value=128, gates="zero", batch=2, heads=2, length=150, segments="packed"),
    slow("gated_delta_rule", gate="none", keys="identical", length=64, state=False),
    slow("gated_delta_rule", gates="mixed", length=1024),
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


@pytest.mark.parametrize("op", ["linear_attention", pytest.param("gated_delta_rule", marks=pytest.mark.slow)])
def test_a_gate_that_cuts_has_no_gradient_and_lets_nothing_through(op):
    arrays, static = problem(op, gates="mixed")
    arrays["g"] = arrays["g"].at[:, 100].set(-jnp.inf)
    (out, _), gradients = run(op, arrays, static, "pallas_gpu")
    assert gradients["g"][0, 100, 0] == 0 and np.isfinite(gradients["g"]).all()
    (other, _), _ = run(op, arrays | {"v": arrays["v"].at[:, :100].multiply(-2)}, static, "pallas_gpu")
    np.testing.assert_array_equal(out[:, 100:], other[:, 100:])
    assert np.any(out[:, :100] != other[:, :100])


@pytest.mark.parametrize("op", OPS)
def test_no_race_and_nothing_read_before_it_is_written(op):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays, static = problem(op, gates="mixed", key=128, length=192)
    params = plgpu.InterpretGPUParams(detect_races=True, on_race="raise", uninitialized_memory="nan")
    with plgpu.force_gpu_interpret_mode(params):
        results = run(op, arrays, static, "pallas_gpu")
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(results))


def abstract_h200(shape=(), names=()):
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


@pytest.mark.parametrize("devices, implementation", [(1, "pallas_gpu"), (8, None)])
@pytest.mark.parametrize("op", OPS)
def test_an_h200_gets_the_kernels_and_no_loop(op, devices, implementation):
    arrays, static = problem(op, batch=8, heads=2)
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)

    def loss(arrays):
        out, final = op_problems.call(op, arrays, static, implementation=implementation)
        return jnp.sum(out.astype(jnp.float32) ** 2) + jnp.sum(final**2)

    with abstract_h200(*(((2, 2, 2), ("data", "fsdp", "tensor")) if devices == 8 else ())):
        text = jax.jit(jax.grad(loss)).trace(specs).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @(mosaic_gpu\w*)\((.*)", text)
    assert len(calls) == len(KERNELS[op]) and len(calls) == text.count("custom_call @mosaic")
    assert set(re.findall(rf'"?({op}_(?:[a-z]+_)*[a-z]+?)_mosaic_gpu', text)) == {f"{op}_{x}" for x in KERNELS[op]}
    assert "stablehlo.while" not in text
    rows, heads = (2, 1) if devices == 8 else (8, 2)
    assert all(f"tensor<{rows}x128x{heads}x64xbf16>" in rest for _, rest in calls)


@pytest.mark.parametrize("op", OPS)
def test_what_the_kernel_cannot_serve_is_said(op):
    unsupported = importlib.import_module(f"engrax.pallas_kernels.{op}.gpu").unsupported
    fine = Shapes(2, 128, 2, 4, 64, 128, 64, np.dtype(jnp.bfloat16), "scalar", False)
    assert unsupported(fine) is None and unsupported(fine._replace(gate="none")) is None
    for change, word in (
        (dict(gate="channel"), "per channel"),
        (dict(segments=True), "per segment"),
        (dict(dtype=np.dtype(np.float32)), "float32"),
        (dict(key=32), "not 32 and 128"),
        (dict(value=256), "not 64 and 256"),
        (dict(chunk=16, length=16), "not 16"),
        (dict(heads=70000), "65535"),
    ):
        assert word in unsupported(fine._replace(**change))
