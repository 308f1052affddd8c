"""Shared by the kernels of all devices: the supported calls, and the XLA form's derivative."""

from collections.abc import Callable

import jax.numpy as jnp

from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm, RetrievalInputs, RetrievalShapes
from engrax.pallas_kernels.hopfield_retrieval.xla import hopfield_retrieval_xla
from engrax.pallas_kernels.passes import Passes, pull_back

MOST_STEPS = 8  # unrolled on TPU: for few patterns, loops fail in the v6e compiler
HIDDEN = -1e30  # added to the score of hidden patterns


def unserved(device: str, shapes: RetrievalShapes) -> str | None:
    """Returns why no kernel can serve a call, or None if one can; the sentence names `device`."""
    if shapes.steps is None or not 2 <= shapes.steps <= MOST_STEPS:
        return f"the {device} kernel makes a fixed number of updates, 2 to {MOST_STEPS} (one is attention)"
    if (shapes.separation, shapes.similarity) != ("softmax", "dot"):
        return f"the {device} kernel has softmax of dot products, not {shapes.separation} of {shapes.similarity}"
    if shapes.mask_per_state:
        return f"the {device} kernel takes masks [B, M], not [B, N, M]"
    if shapes.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the {device} kernel takes float32 or bfloat16, not {jnp.dtype(shapes.dtype)}"
    return None


def passes_of(forward: Callable) -> Passes:
    """Returns the passes of a kernel.

    `forward(form, state, stored, values, beta, hidden)` runs the kernel, and adds hidden [B, M] float32 to the scores.
    Hidden patterns and their values are zeros. If nothing is visible, all have equal weight and their mean is 0.
    """

    def run(form: RetrievalForm, inputs: RetrievalInputs):
        *arrays, visible = inputs
        shown = jnp.ones((len(inputs.state), 1, inputs.stored.shape[2]), bool) if visible is None else visible
        hidden = jnp.where(shown[:, 0], 0, HIDDEN).astype(jnp.float32)
        return forward(form, *arrays, hidden), ()

    def pull(form: RetrievalForm, inputs: RetrievalInputs, residuals, cotangent) -> RetrievalInputs:
        return pull_back(lambda inputs: hopfield_retrieval_xla(form, *inputs), inputs, cotangent)

    return Passes(run, pull)
