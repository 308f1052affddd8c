"""Shared by the tests of GPU kernels: who runs them, how much they may err, and an H200 that is not here."""

import jax
import pytest

from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX

needs_kernels = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)
SLACK, FLOOR, MOST = 1.5, 1e-5, 0.03  # a kernel may err that many times as much as the XLA form, which stays below MOST


def abstract_h200(shape=(), names=()):
    """A context in which programs are traced for a mesh of H200."""
    from jax.sharding import AbstractDevice, AbstractMesh, AxisType

    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="cuda")
    mesh = AbstractMesh(shape, names, axis_types=(AxisType.Auto,) * len(shape), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def compare_errors(own, others):
    """Asserts that each error of a kernel is small beside the same error of the XLA form."""
    for (path, error), other in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(others), strict=True):
        name = jax.tree_util.keystr(path)
        assert other <= MOST, f"{name}: the XLA form errs by {other}"
        assert error <= max(SLACK * other, FLOOR), f"{name}: the kernel errs by {error}, the XLA form by {other}"
