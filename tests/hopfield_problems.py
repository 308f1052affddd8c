"""Problems of Hopfield retrieval that the tests of its kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels import hopfield_retrieval
from engrax.tests.op_problems import relative_rms


def make_problem(states, patterns, width, value, masked):
    """Returns (state, stored, values), float32, and a mask; the second row sees nothing."""
    rng = np.random.default_rng(0)
    shapes = (2, states, 2, width), (2, patterns, 2, width), (2, patterns, 2, value)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    mask = rng.random((2, patterns)) < 0.7
    mask[0, 0], mask[1] = True, False
    return arrays, jnp.asarray(mask) if masked else None


def with_gradients(arrays, mask, implementation, steps=3):
    @jax.jit
    def run(*arrays):
        def call(*arrays, beta):
            return hopfield_retrieval(*arrays, beta=beta, steps=steps, mask=mask, implementation=implementation)

        beta = jnp.asarray([0.2, 0.6], jnp.promote_types(arrays[0].dtype, jnp.float32))
        out, pull = jax.vjp(lambda beta, *arrays: call(*arrays, beta=beta), beta, *arrays)
        return out, pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))

    return run(*arrays)


def assert_as_accurate_as_xla(kernel, arrays, mask, *, slack, floor, steps=3):
    """Asserts that values and gradients of the kernel err by slack times the XLA form's error at most, or by floor."""
    with jax.enable_x64(True):
        truth = with_gradients([x.astype(jnp.float64) for x in arrays], mask, "reference", steps)
        truth = jax.tree.map(np.asarray, truth)
    found, xla = (with_gradients(arrays, mask, name, steps) for name in (kernel, "xla"))
    for own, other in zip(*(jax.tree.leaves(relative_rms(x, truth)) for x in (found, xla))):
        assert own <= max(slack * other, floor), (own, other)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(xla)]
    if mask is not None:
        assert np.all(np.asarray(found[0])[1] == 0)
