"""The law of implementations runs kernels, interpreted, and a kernel that errs breaks it."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from engrax.laws import Breach, Subject
from engrax.laws.kernels import kernels_agree
from engrax.layers import MIXERS
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX
from engrax.pallas_kernels.passes import Passes

pytestmark = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)


def broken(monkeypatch, kernel: str) -> None:
    """Replaces the forward pass of a kernel of `neural_memory` by one that scales the features of its outputs."""
    module = importlib.import_module(f"engrax.pallas_kernels.neural_memory.{kernel}")
    sound = module.passes

    def forward(plan, inputs):
        (out, carry), residuals = sound.forward(plan, inputs)
        return (out * jnp.linspace(0.9, 1.1, out.shape[-1], dtype=out.dtype), carry), residuals

    def run(plan, inputs):
        return forward(plan, inputs)[0]

    monkeypatch.setattr(module, "passes", Passes(forward, sound.backward, run))
    jax.clear_caches()  # of what was traced with the sound one


@pytest.mark.deep
def test_an_example_runs_its_kernel_and_a_broken_one_is_caught(monkeypatch, x64):
    s = Subject(MIXERS["titans"].examples()[1], thorough=False)
    assert kernels_agree(s) == ["pallas_tpu"]
    broken(monkeypatch, "tpu")
    with pytest.raises(Breach, match="the output of 'pallas_tpu' errs by"):
        kernels_agree(s)


@pytest.mark.long
def test_gpu_kernels_run_at_the_sizes_they_serve(x64):
    """No example has heads of 64 and chunks of 64: the law takes them; values and gradients."""
    s = Subject(MIXERS["titans"].examples()[1], thorough=False)
    assert kernels_agree(s, deep=True) == ["pallas_gpu", "pallas_tpu"]
