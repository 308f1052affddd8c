"""Shared by the kernels of all devices: the supported calls, and the XLA form's derivative."""

from collections.abc import Callable

import jax.numpy as jnp

from engrax.pallas_kernels.hopfield_retrieval.types import RetrievalForm, RetrievalInputs, RetrievalShapes
from engrax.pallas_kernels.hopfield_retrieval.visibility import UNSEEN
from engrax.pallas_kernels.hopfield_retrieval.xla import hopfield_retrieval_xla
from engrax.pallas_kernels.passes import Passes, pull_back

MOST_STEPS = 8  # unrolled on TPU: for few patterns, loops fail in the v6e compiler
HIDDEN = -1e30  # the score of a pattern that the state does not see; finite, so that no difference of two is NaN


def unserved(device: str, shapes: RetrievalShapes) -> str | None:
    """Returns why no kernel can serve a call, or None if one can; the sentence names `device`."""
    if shapes.steps is None or not 2 <= shapes.steps <= MOST_STEPS:
        return f"the {device} kernel makes a fixed number of updates, 2 to {MOST_STEPS} (one is attention)"
    if (shapes.separation, shapes.similarity) != ("softmax", "dot"):
        return f"the {device} kernel has softmax of dot products, not {shapes.separation} of {shapes.similarity}"
    if shapes.mask_per_state:
        return f"the {device} kernel takes causal, window, segment_ids and masks [B, M], not masks [B, N, M]"
    if shapes.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the {device} kernel takes float32 or bfloat16, not {jnp.dtype(shapes.dtype)}"
    return None


def passes_of(forward: Callable) -> Passes:
    """Returns the passes of a kernel.

    `forward(form, state, stored, values, beta, ids, stored_ids)` runs the kernel. A state sees the patterns with its
    own id, ids [B, N] and stored_ids [B, M], within the form's reach. If it sees none, it retrieves 0.
    """

    def run(form: RetrievalForm, inputs: RetrievalInputs):
        *arrays, sight = inputs
        (batch, _, states, _), patterns = inputs.state.shape, inputs.stored.shape[2]
        ids, stored_ids = sight.segments, sight.stored_segments
        if ids is None:
            ids, stored_ids = (jnp.zeros((batch, size), jnp.int32) for size in (states, patterns))
        if sight.mask is not None:
            stored_ids = jnp.where(sight.mask[:, 0], stored_ids, UNSEEN)
        return forward(form, *arrays, ids.astype(jnp.int32), stored_ids.astype(jnp.int32)), ()

    def pull(form: RetrievalForm, inputs: RetrievalInputs, residuals, cotangent) -> RetrievalInputs:
        return pull_back(lambda inputs: hopfield_retrieval_xla(form, *inputs), inputs, cotangent)

    return Passes(run, pull)
