"""The TPU kernel of Hopfield retrieval without a TPU: interpreted against float64 and the XLA form, lowered by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import hopfield_retrieval
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, interpreted_kernels
from engrax.tests.hopfield_problems import assert_as_accurate_as_xla, make_problem, make_seen

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)
SLACK = 1.5  # a kernel's error may be that many times the XLA form's


@pytest.fixture(params=[False], ids=[""])
def interpreted(request, capfd):
    """Interprets kernels, with race detection where the test asks for it."""
    from jax.experimental.pallas import tpu as pltpu

    params = pltpu.InterpretParams(detect_races=request.param, out_of_bounds_reads="raise", uninitialized_memory="nan")
    with interpreted_kernels(), pltpu.force_tpu_interpret_mode(params):
        yield
    pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out


def long(*values):
    return pytest.param(*values, marks=pytest.mark.long)


@pytest.mark.parametrize(
    "states, patterns, width, value, sees, dtype",
    [
        (20, 40, 16, 24, "causal window cross", jnp.float32),
        long(40, 40, 16, 16, "causal segments", jnp.bfloat16),  # as in training with packed rows
        long(300, 130, 8, 8, "causal", jnp.float32),  # the first states are before all patterns
        long(20, 40, 16, 24, "mask", jnp.float32),
        long(20, 40, 16, 24, "mask", jnp.bfloat16),
        long(300, 130, 8, 8, "all", jnp.float32),  # two blocks of states, the last one not full
        long(1, 1, 1, 1, "all", jnp.float32),
        long(33, 128, 64, 64, "mask", jnp.bfloat16),
    ],
)
def test_as_accurate_as_the_xla_form(states, patterns, width, value, sees, dtype, interpreted):
    arrays, mask = make_problem(states, patterns, width, value, True)
    arrays, seen = [x.astype(dtype) for x in arrays], make_seen(sees, states, patterns, mask=mask)
    floor = 1e-6 if dtype == jnp.float32 else 1e-3
    assert_as_accurate_as_xla("pallas_tpu", arrays, seen, slack=SLACK, floor=floor)


@pytest.mark.parametrize("interpreted", [True], ids=["races"], indirect=True)
def test_no_races(interpreted):
    arrays, mask = make_problem(40, 30, 8, 8, True)
    out = hopfield_retrieval(*arrays, beta=0.5, steps=2, mask=mask, implementation="pallas_tpu")
    np.testing.assert_allclose(out, hopfield_retrieval(*arrays, beta=0.5, steps=2, mask=mask), atol=1e-5)


def test_lowered_by_its_name():
    from jax.sharding import AbstractDevice, AbstractMesh

    arrays, mask = make_problem(40, 130, 64, 64, True)
    device = AbstractDevice(device_kind="TPU v5e", num_cores=1, platform="tpu")
    for steps, found in ((3, True), (1, False)):  # one update is attention
        run = jax.jit(lambda *a, steps=steps: hopfield_retrieval(*a, beta=0.5, steps=steps, mask=mask))
        with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
            text = run.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
        assert ("hopfield_retrieval_forward" in text) == found


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(steps=1), "2 to 8"),
        (dict(steps=9), "2 to 8"),
        (dict(steps=None), "a fixed number of updates"),
        (dict(separation="sparsemax"), "not sparsemax of dot"),
        (dict(mask=jnp.ones((2, 4, 5), bool)), r"not masks \[B, N, M\]"),
    ],
)
def test_what_it_does_not_serve(change, message):
    arrays, _ = make_problem(4, 5, 3, 3, False)
    with interpreted_kernels(), pytest.raises(NotImplementedError, match=message):
        hopfield_retrieval(*arrays, **(dict(beta=1.0, steps=2) | change), implementation="pallas_tpu")


def test_patterns_that_do_not_fit():
    shape = jax.ShapeDtypeStruct((1, 200_000, 1, 128), jnp.float32)
    state = jax.ShapeDtypeStruct((1, 8, 1, 128), jnp.float32)
    with interpreted_kernels(), pytest.raises(NotImplementedError, match="MiB of VMEM for these patterns"):
        jax.eval_shape(
            lambda s, x: hopfield_retrieval(s, x, beta=1.0, steps=2, implementation="pallas_tpu"), state, shape
        )
