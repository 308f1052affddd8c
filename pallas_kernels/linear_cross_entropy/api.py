"""The public operation `linear_cross_entropy`: contract, validation and choice of an implementation."""

from functools import partial
from typing import NamedTuple, no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels.common.matmul import accumulator
from engrax.pallas_kernels.common.segments import mask_tokens
from engrax.pallas_kernels.common.validation import check_array, check_positive_int, check_rank
from engrax.pallas_kernels.dispatch import choose
from engrax.pallas_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from engrax.pallas_kernels.linear_cross_entropy.xla import linear_cross_entropy_xla

OP = "linear_cross_entropy"


class CrossEntropyShapes(NamedTuple):
    """The sizes of a call, as `dispatch.Call` records them."""

    batch: int
    length: int
    features: int
    vocabulary: int
    dtype: np.dtype


@no_type_check  # its errors name the argument and the expected shape; the functions it calls are checked
def linear_cross_entropy(hidden, embedding, labels, *, soft_cap=None, chunk_size=1024, implementation=None):
    """Returns the cross entropy of every token under a linear head, and whether the head predicts it:

        z_v = h_t . e_v,  or  soft_cap tanh(h_t . e_v / soft_cap)
        nats_t = log sum_v exp(z_v) - z_label,   correct_t = [label is the first v of largest z_v]

    The logits `[B, T, V]` are never in memory, forward or backward. The vocabulary is processed `chunk_size` entries at
    a time, and the backward pass recomputes the logits (a third more operations than saving them).

    Args:
      hidden: the head's inputs `[B, T, D]`; float64, float32, bfloat16 or float16.
      embedding: the head's rows, `[V, D]`, V the size of the vocabulary.
      labels: int `[B, T]` in [0, V) (not checked), or -1 for a token without a label. Its loss is 0, and its hidden
        state may have any value and gets no gradient.
      soft_cap: the largest absolute logit, above 0 (arXiv 2408.00118); None = no cap.
      chunk_size: vocabulary entries processed at once; temporary memory is that of `[B, T, chunk_size]`.
      implementation: None (choose), "reference" (all logits) or "xla" (tile by tile).

    Returns:
      (nats, correct): the losses `[B, T]`, float32 (float64 if hidden or embedding is), and bool `[B, T]`, False where
      there is no label.

    Raises:
      ValueError: an argument has a wrong shape, dtype or value; the message names it.
      NotImplementedError: `implementation` names a kernel that does not exist.
    """
    options = dict(soft_cap=soft_cap, chunk_size=chunk_size, implementation=implementation)
    return linear_cross_entropy_terms(hidden, embedding, labels, **options)[:2]


@no_type_check
def linear_cross_entropy_terms(hidden, embedding, labels, *, soft_cap=None, chunk_size=1024, implementation=None):
    """Returns `linear_cross_entropy`'s (nats, correct) and log sum_v exp(z_v) `[B, T]`, 0 for tokens without a
    label. The latter is for a z-loss (arXiv 2204.02311)."""
    check_rank("hidden", hidden, "[B, T, D]")
    check_rank("embedding", embedding, "[V, D]")
    check_array("hidden", hidden, "[B, T, D]", hidden.shape)
    check_array("embedding", embedding, "[V, D]", (embedding.shape[0], hidden.shape[2]))
    check_array("labels", labels, "[B, T]", hidden.shape[:2], jnp.integer)
    check_positive_int("chunk_size", chunk_size)
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap is {soft_cap!r}, wanted a number above 0 or None.")
    cap = None if soft_cap is None else float(soft_cap)
    sizes = CrossEntropyShapes(*hidden.shape, embedding.shape[0], jnp.dtype(jnp.result_type(hidden, embedding)))
    choice = choose(OP, sizes, implementation)
    return _run(choice.reference, int(chunk_size), cap, hidden, embedding, labels)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _run(reference, chunk_size, soft_cap, hidden, embedding, labels):
    dtype = jnp.result_type(hidden, embedding)
    hidden = mask_tokens(labels >= 0, hidden)
    if reference:
        wide = (x.astype(accumulator(dtype)) for x in (hidden, embedding))
        return linear_cross_entropy_reference(*wide, labels, soft_cap=soft_cap)
    hidden, embedding = hidden.astype(dtype), embedding.astype(dtype)
    return linear_cross_entropy_xla(hidden, embedding, labels, chunk_size=chunk_size, soft_cap=soft_cap)
