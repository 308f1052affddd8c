"""The GPU kernel of Hopfield retrieval without a GPU: interpreted against float64 and the XLA form, lowered by name."""

import jax
import jax.numpy as jnp
import pytest

from engrax.pallas_kernels import hopfield_retrieval
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, interpreted_kernels
from engrax.tests.hopfield_problems import assert_as_accurate_as_xla, make_problem, make_seen

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)
SLACK = 1.5  # a kernel's error may be that many times the XLA form's


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "states, patterns, width, value, sees, steps, dtype",
    [
        (70, 135, 24, 40, "causal window cross", 2, jnp.float32),  # two programs a head, each skips a block of patterns
        long(70, 70, 16, 16, "causal segments", 3, jnp.bfloat16),  # as in training with packed rows
        long(140, 70, 64, 128, "causal", 2, jnp.bfloat16),  # the first states are before all patterns
        long(20, 70, 64, 64, "mask", 2, jnp.float32),
        long(20, 70, 64, 64, "mask", 3, jnp.bfloat16),
        long(70, 200, 64, 128, "all", 2, jnp.bfloat16),  # two programs a head, the last one not full
        long(1, 1, 64, 128, "all", 8, jnp.float32),
        long(33, 192, 128, 128, "mask", 4, jnp.bfloat16),
    ],
)
def test_as_accurate_as_the_xla_form_and_free_of_races(states, patterns, width, value, sees, steps, dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    arrays, mask = make_problem(states, patterns, width, value, True)
    arrays, seen = [x.astype(dtype) for x in arrays], make_seen(sees, states, patterns, mask=mask)
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    floor = 1e-6 if dtype == jnp.float32 else 1e-3
    with interpreted_kernels(), plgpu.force_gpu_interpret_mode(params):
        assert_as_accurate_as_xla("pallas_gpu", arrays, seen, slack=SLACK, floor=floor, steps=steps)


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.deep), 8])
def test_an_h200_gets_the_kernel_where_it_serves(devices):
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    specs = [jax.ShapeDtypeStruct((8, n, 2, 64), jnp.bfloat16) for n in (40, 130)]
    mask = jax.ShapeDtypeStruct((8, 130), bool)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    axes = ((2, 2, 2), ("data", "fsdp", "tensor")) if devices == 8 else ((), ())
    mesh = AbstractMesh(*axes, axis_types=(AxisType.Auto,) * len(axes[0]), abstract_device=device)
    rows, heads = (2, 1) if devices == 8 else (8, 2)
    for steps, served in ((3, True), (1, False)):  # one update is attention
        run = jax.jit(lambda s, x, mask, steps=steps: hopfield_retrieval(s, x, beta=0.5, steps=steps, mask=mask))
        with jax.sharding.use_abstract_mesh(mesh):
            text = run.trace(*specs, mask).lower(lowering_platforms=("cuda",)).as_text()
        assert ("hopfield_retrieval_forward" in text) == served
        assert not served or f"tensor<{rows}x{heads}x64x64xf32>" in text


half = jnp.ones((2, 4, 2, 64), jnp.float16)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=1), "2 to 8"),
        (dict(steps=9), "2 to 8"),
        (dict(steps=None), "a fixed number of updates"),
        (dict(separation="sparsemax"), "not sparsemax of dot"),
        (dict(mask=jnp.ones((2, 4, 5), bool)), r"not masks \[B, N, M\]"),
        (dict(values=jnp.ones((2, 5, 2, 136))), "D and V of at most 128, not 64 and 136"),
        (
            dict(state=jnp.ones((2, 4, 2, 128)), stored=jnp.ones((2, 5, 2, 128))),
            "float32 states of at most 64 features, not 128",
        ),
        (dict(stored=jnp.ones((2, 5000, 2, 64))), "2011 KiB of SMEM for 79 blocks of 64 patterns of 64 f"),
        (dict(state=half, stored=half), "float32 or bfloat16, not float16"),
    ],
)
def test_what_it_does_not_serve(change, message):
    (state, stored, _), _ = make_problem(4, 5, 64, 64, False)
    arguments = dict(state=state, stored=stored, beta=1.0, steps=2) | change
    with interpreted_kernels(), pytest.raises(NotImplementedError, match=message):
        hopfield_retrieval(**arguments, implementation="pallas_gpu")
