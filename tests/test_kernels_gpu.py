"""The linear operations' Mosaic GPU kernels without a GPU: interpreted against float64 and the XLA forms, and lowered.

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
from engrax.pallas_kernels.dispatch import interpreted_kernels
from engrax.tests import op_problems
from engrax.tests.gpu_kernels import abstract_h200, compare_errors, needs_kernels

pytestmark = needs_kernels
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
    deep("linear_attention", groups=2, length=150, gates="mixed"),
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
    compare_errors(*(op_problems.relative_rms(got, wanted) for got in (kernel, xla)))


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
@pytest.mark.parametrize("op", ["linear_attention", pytest.param("gated_delta_rule", marks=pytest.mark.deep)])
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
@pytest.mark.parametrize("op", ["linear_attention", pytest.param("gated_delta_rule", marks=pytest.mark.deep)])
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
