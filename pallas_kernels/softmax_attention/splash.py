"""Softmax attention by jax's splash attention, Mosaic kernels for TPU that skip blocks no query sees."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.passes import Passes
from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs, AttentionShapes, Outputs

LANES, MOST_BLOCK = 128, 512  # queries and keys of a block: a multiple of the lanes, and the most


def unsupported(shapes: AttentionShapes) -> str | None:
    """Returns why the kernels cannot serve a call, or None if they can."""
    if shapes.dtype != jnp.bfloat16:
        return f"splash attention is used in bfloat16, not {shapes.dtype}: its products round to 16 bits"
    if shapes.key % 8:
        return f"splash attention is used for heads of a multiple of 8 channels, not {shapes.key}"
    if jax.config.jax_enable_x64:
        return "splash attention does not trace with 64-bit types"
    if shapes.log_sum:
        return "splash attention's log of the softmax's sum has no gradient"
    return None


def _splash(form: AttentionForm, inputs: AttentionInputs) -> Outputs:
    dims = ("BTHK", "BTHK", "BTHK", None if inputs.segment_ids is None else "BT")
    return (shard_over_batch_and_heads(partial(_rows, form), dims, "BTHK")(*inputs),)


def _rows(form, q, k, v, segment_ids):
    length, after = q.shape[1], -q.shape[1] % LANES
    q, k, v = (jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, after), (0, 0)]) for x in (q, k, v))
    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, [(0, 0), (0, after)], constant_values=-1)
        ids = splash.SegmentIds(ids, ids)
    run = _kernel(form, q.shape[1], q.shape[2])
    out = jax.vmap(run)((q * form.scale).astype(q.dtype), k, v, ids)
    return jnp.swapaxes(out, 1, 2)[:, :length]


def _kernel(form, heads, length):
    window = (None if form.window is None else form.window - 1, 0)
    mask = splash.MultiHeadMask([splash.LocalMask((length, length), window, 0)] * heads)
    block = next(size for size in range(MOST_BLOCK, 0, -LANES) if length % size == 0)
    sizes = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks = splash.BlockSizes(**{f"block_{name}": block for name in sizes})
    return splash.make_splash_mha(
        mask=mask, block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=form.interpret
    )


passes = Passes.saving(_splash)
