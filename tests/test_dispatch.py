"""The choice of an implementation: by name, by the architecture in sight, by the platform of the lowered program."""

import importlib
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from engrax.pallas_kernels import available, devices, dispatch, linear_attention
from engrax.pallas_kernels.common.log_decay import LogDecayPlan, LogDecayShapes
from engrax.pallas_kernels.dispatch import choose, explain, kernel
from engrax.pallas_kernels.linear_attention.vjp import LinearInputs
from engrax.tests import hopfield_problems, neural_memory_problems, op_problems

needs_kernels = pytest.mark.skipif(
    jax.__version_info__[:3] < dispatch.KERNELS_NEED_JAX, reason="there are no kernels on this jax"
)
OP = "linear_attention"
FINE = LogDecayShapes(2, 128, 2, 2, 64, 64, 64, np.dtype(jnp.bfloat16), "scalar", 0)
KERNELS = {"pallas_gpu", "pallas_tpu"}
KERNELS_OF = {"softmax_attention": {"cudnn_attention", "cudnn_or_xla", "splash_attention"}}


def names(choice):
    return [(platform, found.name) for platform, found in choice.branches]


def see(monkeypatch, *found):
    monkeypatch.setattr(devices, "in_sight", lambda: found)


@pytest.mark.parametrize("op", dispatch.OPERATIONS)
def test_every_operation_says_what_it_has(op):
    here, missing = available(op)
    assert here[:2] == ("reference", "xla") and set(here) | set(missing) == {
        "reference",
        "xla",
        *KERNELS_OF.get(op, KERNELS),
    }
    assert all(len(reason) > 20 for reason in missing.values())
    listed = [found.name for found in dispatch.implementations(op)]
    assert len(set(listed)) == len(listed) and listed[-2:] == ["xla", "reference"]  # kernels come first


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown operation 'linear_atention'; did you mean 'linear_attention'"):
        available("linear_atention")
    with pytest.raises(ValueError, match="unknown implementation 'Xla'; did you mean 'xla'.* .known: reference, xla"):
        choose(OP, FINE, "Xla")


@needs_kernels
def test_a_kernel_needs_its_device():
    for name, device in (("pallas_tpu", "TPU"), ("pallas_gpu", "GPU of compute capability 9.0")):
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: it needs a {device}, none is here; use"):
            choose(OP, FINE, name)


@needs_kernels
def test_an_explicit_name_never_falls_back(monkeypatch):
    see(monkeypatch, devices.NAMED["h200"])
    assert names(choose(OP, FINE)) == [("cuda", "pallas_gpu"), (None, "xla")]
    for name in ("xla", "reference", "pallas_gpu"):
        assert names(choose(OP, FINE, name)) == [(None, name)]
    with pytest.raises(NotImplementedError, match="'pallas_gpu' cannot run: .* of 64 tokens, not 16; use 'xla'"):
        choose(OP, FINE._replace(chunk=16), "pallas_gpu")
    assert names(choose(OP, FINE._replace(chunk=16))) == [(None, "xla")]


@needs_kernels
def test_interpreted_kernels_need_no_device():
    with dispatch.interpreted_kernels():
        assert names(choose(OP, FINE, "pallas_tpu")) == [(None, "pallas_tpu")]
        assert choose(OP, FINE, "pallas_tpu").interpret and dispatch.interpreting()
        with pytest.raises(NotImplementedError, match="chunks of a multiple of 16"):
            choose(OP, FINE._replace(chunk=24), "pallas_tpu")
        assert names(choose(OP, FINE)) == [(None, "xla")]  # only by name
    assert not dispatch.interpreting()


def test_an_old_jax_has_no_kernels(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    package = importlib.import_module("engrax.pallas_kernels.linear_attention")
    listed = (kernel("pallas_gpu", "cuda", ("sm_90",), "nowhere"), *package.IMPLEMENTATIONS[2:])  # not even imported
    monkeypatch.setattr(package, "IMPLEMENTATIONS", listed)
    with pytest.raises(NotImplementedError, match=r"kernels need jax >= 0.11.2, this is "):
        choose(OP, FINE, "pallas_gpu")
    see(monkeypatch, devices.NAMED["h200"])
    assert names(choose(OP, FINE)) == [(None, "xla")]


# ---------------------------------------------------------------------------------------------------------------------
# The device in sight


@needs_kernels
@pytest.mark.parametrize(
    "device, wanted, reason",
    [
        (devices.NAMED["h100"], "pallas_gpu", None),
        (devices.NAMED["h200"], "pallas_gpu", None),
        (devices.NAMED["b200"], "xla", r"compute capability 9.0 \(sm_90\), this is NVIDIA B200"),
        (devices.Device("cuda", "NVIDIA A100", "sm_80"), "xla", r"\(sm_90\), this is NVIDIA A100"),
        (devices.Device("cuda", "NVIDIA New", None), "xla", "the architecture of 'NVIDIA New' is not known"),
        (devices.NAMED["v5e"], "pallas_tpu", None),
        (devices.Device("tpu", "TPU v99", None), "xla", "the architecture of 'TPU v99' is not known"),
        (devices.NAMED["cpu"], "xla", None),
    ],
)
def test_a_kernel_takes_part_where_its_architecture_is_in_sight(monkeypatch, device, wanted, reason):
    see(monkeypatch, device)
    assert names(choose(OP, FINE))[0] == (None if wanted == "xla" else device.platform, wanted)
    if reason is not None:
        with pytest.raises(NotImplementedError, match=reason):
            choose(OP, FINE, {"cuda": "pallas_gpu", "tpu": "pallas_tpu"}[device.platform])


@needs_kernels
def test_two_kinds_of_gpu_in_a_process_leave_no_kernel(monkeypatch):
    see(monkeypatch, devices.NAMED["h200"], devices.Device("cuda", "NVIDIA A100", "sm_80"))
    assert names(choose(OP, FINE)) == [(None, "xla")]


@pytest.mark.parametrize(
    "platform, kind, capability, wanted",
    [
        ("gpu", "NVIDIA H100 80GB HBM3", None, ("cuda", "sm_90")),
        ("cuda", "NVIDIA GH200 480GB", None, ("cuda", "sm_90")),
        ("gpu", "NVIDIA GB200", None, ("cuda", "sm_100")),
        ("cuda", "NVIDIA A100-SXM4-80GB", None, ("cuda", "sm_80")),
        ("cuda", "NVIDIA Quadro", "7.5", ("cuda", "sm_75")),
        ("cuda", "NVIDIA B200", "10.0", ("cuda", "sm_100")),
        ("gpu", "AMD Instinct MI300X", None, ("rocm", None)),
        ("tpu", "TPU v5 lite", None, ("tpu", "v5e")),
        ("tpu", "TPU v5p", None, ("tpu", "v5p")),
        ("tpu", "TPU v6 lite", None, ("tpu", "v6e")),
        ("cpu", "cpu", None, ("cpu", None)),
    ],
)
def test_architectures_by_kind(platform, kind, capability, wanted):
    device = devices._device(platform, kind, capability)
    assert (device.platform, device.architecture) == wanted


@needs_kernels
def test_the_mesh_says_which_device_is_in_sight():
    assert not {device.platform for device in devices.in_sight()} - {"cuda", "tpu"}
    abstract = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        assert devices.in_sight() == (devices.NAMED["h200"],)
        assert names(choose(OP, FINE, "pallas_gpu")) == [(None, "pallas_gpu")]
        with pytest.raises(NotImplementedError, match="it needs a TPU, this is NVIDIA H200"):
            choose(OP, FINE, "pallas_tpu")
    for name, device in devices.NAMED.items():
        with devices.use(device):
            assert devices.in_sight() == (device,), name
    with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))):
        assert devices.in_sight() == (devices.NAMED["cpu"],)  # the mesh's device, whatever else the process has


@needs_kernels
def test_a_topology_mesh_counts_as_in_sight():
    """Its devices are no devices of this process; a stand-in has what a topology's device has."""

    class Described:
        platform, device_kind, process_index, id, num_cores = "tpu", "TPU v5 lite", 0, 0, 1

    mesh = Mesh(np.array([Described()], object), ("data",), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert devices.in_sight() == (devices.NAMED["v5e"],)
        assert names(choose(OP, FINE)) == [("tpu", "pallas_tpu"), (None, "xla")]


def test_a_kernel_out_of_sight_is_neither_imported_nor_traced(monkeypatch):
    monkeypatch.setattr(dispatch.Later, "load", None)  # would raise
    assert names(choose(OP, FINE)) == [(None, "xla")]


# ---------------------------------------------------------------------------------------------------------------------
# A kernel is one file and one line

SECOND = """
    import jax.numpy as jnp
    from engrax.pallas_kernels.passes import Passes

    MARK = {mark}

    def unsupported(shapes):
        return "{name} takes one head" if shapes.heads != 1 else None

    def _forward(plan, inputs):
        return (jnp.full_like(inputs.v, MARK), inputs.state), ()

    def _backward(plan, inputs, residuals, cotangents):
        return inputs._replace(v=jnp.full_like(inputs.v, MARK + 1), layout=None)

    passes = Passes(_forward, _backward)
"""


@pytest.fixture
def second_kernels(tmp_path, monkeypatch):
    """Two more CUDA kernels, a file and a line each: one for the B200, one for the H200 before today's."""
    package = importlib.import_module("engrax.pallas_kernels.linear_attention")
    monkeypatch.syspath_prepend(tmp_path)
    for name, mark in (("kernel_of_a_b200", 22), ("another_of_a_h200", 44)):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(SECOND).format(name=name, mark=mark))
    monkeypatch.setattr(
        package,
        "IMPLEMENTATIONS",
        (
            kernel("gpu_b200", "cuda", ("sm_100",), "kernel_of_a_b200"),
            kernel("gpu_one_head", "cuda", ("sm_90",), "another_of_a_h200"),
            *package.IMPLEMENTATIONS,
        ),
    )
    yield
    for name in ("kernel_of_a_b200", "another_of_a_h200"):
        sys.modules.pop(name, None)


@needs_kernels
def test_kernels_of_one_platform_stand_side_by_side(second_kernels, monkeypatch):
    one_head = FINE._replace(heads=1, query_heads=1)
    for device, shapes, wanted in (
        ("b200", one_head, [("cuda", "gpu_b200"), (None, "xla")]),
        ("b200", FINE, [(None, "xla")]),
        ("h200", one_head, [("cuda", "gpu_one_head"), (None, "xla")]),
        ("h200", FINE, [("cuda", "pallas_gpu"), (None, "xla")]),  # the next one of its platform
        ("v5e", FINE, [("tpu", "pallas_tpu"), (None, "xla")]),
    ):
        see(monkeypatch, devices.NAMED[device])
        assert names(choose(OP, shapes)) == wanted, device
    see(monkeypatch, devices.NAMED["h200"])
    for name in ("gpu_one_head", "pallas_gpu"):  # both by name, on the device that both are for
        assert names(choose(OP, one_head, name)) == [(None, name)]
    with pytest.raises(NotImplementedError, match="'gpu_b200' cannot run: .* 10.0 .sm_100., this is NVIDIA H200"):
        choose(OP, one_head, "gpu_b200")
    with pytest.raises(NotImplementedError, match="gpu_one_head' cannot run: another_of_a_h200 takes one head"):
        choose(OP, FINE, "gpu_one_head")


def numbers(text):
    """The marks in the text of a program."""
    return {mark for mark in (22, 23, 44, 45) if f"{mark / 10:.6f}e+01" in text}


@needs_kernels
@pytest.mark.parametrize("device, mark", [("b200", 22), ("h200", 44)])
def test_the_platform_is_chosen_when_lowering(second_kernels, device, mark):
    """One trace; the kernel for its own platform, forwards and backwards, the XLA form for all others."""
    x = jnp.ones((1, 8, 1, 4))

    def loss(x):
        return jnp.sum(linear_attention(x, x, x)[0] ** 2)

    with devices.use(devices.NAMED[device]):
        traced = jax.jit(jax.value_and_grad(loss)).trace(x)
    assert numbers(traced.lower(lowering_platforms=("cuda",)).as_text()) == {mark, mark + 1}
    for platform in ("cpu", "tpu", "rocm"):
        assert numbers(traced.lower(lowering_platforms=(platform,)).as_text()) == set(), platform


@needs_kernels
@pytest.mark.parametrize(
    "op", [OP, "hopfield_retrieval", "neural_memory", pytest.param("gated_delta_rule", marks=pytest.mark.deep)]
)
def test_a_program_traced_beside_a_kernel_runs_elsewhere(op):
    """The table's last branch: values and gradients of the XLA form alone, though the kernel is in the program."""
    if op == "neural_memory":
        arrays, static = neural_memory_problems.make_problem(depth=1, batch=1, heads=1, length=8, chunk=4)
        arrays = jax.tree.map(lambda x: jnp.asarray(x, x.dtype if x.dtype == jnp.int32 else jnp.float32), arrays)

        def run(arrays, name):
            out, state = neural_memory_problems.call(arrays, static, implementation=name)
            return out, state[:3]
    elif op == "hopfield_retrieval":
        state, stored, values = (x.astype(jnp.float32) for x in hopfield_problems.make_problem(4, 5, 8, 8, False)[0])
        arrays = {"state": state, "stored": stored, "values": values}

        def run(arrays, name):
            call = importlib.import_module("engrax.pallas_kernels").hopfield_retrieval
            return call(**arrays, beta=0.5, steps=3, implementation=name)
    else:
        case = dict(batch=1, length=32, heads=1, key=8, value=8, chunk=16, gate="scalar")
        arrays, static = op_problems.make_problem(op, **case)
        arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)

        def run(arrays, name):
            return op_problems.call(op, arrays, static, implementation=name)

    def both(name, arrays):
        outputs, pull = jax.vjp(lambda arrays: run(arrays, name), arrays)
        return outputs, pull(jax.tree.map(jnp.ones_like, outputs))

    with devices.use(devices.NAMED["v5e"]), dispatch.recorded_calls() as calls:
        lowered = jax.jit(lambda arrays: both(None, arrays)).trace(arrays).lower(lowering_platforms=("cpu",))
    assert {explain(call, devices.NAMED["v5e"]).by for call in calls} == {"pallas_tpu"}
    got, wanted = lowered.compile()(arrays), jax.jit(lambda arrays: both("xla", arrays))(arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


# ---------------------------------------------------------------------------------------------------------------------
# What is recorded and explained


@needs_kernels
def test_calls_are_recorded_and_explained():
    x = jnp.ones((1, 8, 1, 4))
    with dispatch.recorded_calls() as calls:
        jax.eval_shape(linear_attention, x, x, x)
        with dispatch.recorded_calls() as inner:
            jax.eval_shape(lambda x: linear_attention(x, x, x, implementation="xla"), x)
    jax.eval_shape(linear_attention, x, x, x)  # outside
    assert [call.asked for call in calls] == [None] and [call.asked for call in inner] == ["xla"]
    assert calls[0].op == OP and calls[0].shapes.length == 8
    by, others = explain(dispatch.Call(OP, FINE, None), devices.NAMED["h200"])
    assert by == "pallas_gpu" and list(others) == ["pallas_tpu", "xla", "reference"]
    assert others["xla"] == "'pallas_gpu' comes first" and "this is NVIDIA H200" in others["pallas_tpu"]
    by, others = explain(calls[0], devices.NAMED["h200"])
    assert by == "xla" and "bfloat16" in others["pallas_gpu"]
    by, others = explain(inner[0], devices.NAMED["h200"])
    assert by == "xla" and others["pallas_gpu"] == "the caller asks for 'xla'"


def test_the_core_by_hand():
    """`Choice.run` is the core itself: what `api` does around it is its own."""
    x, state = jnp.ones((1, 16, 1, 4)), jnp.zeros((1, 1, 4, 4))
    out, _ = choose(OP, FINE).run(LogDecayPlan(16, 0.5), LinearInputs(x, x, x, None, state, None))
    np.testing.assert_allclose(out, linear_attention(x, x, x)[0], rtol=1e-6)
