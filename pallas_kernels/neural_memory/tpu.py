"""The scan over blocks as two TPU kernels: weights and momentum stay in VMEM from the first block to the last.

The grid is (B, H, N). A TPU runs the last axis in order, so scratch memory carries the state from block to block. Only
the state at the start of every group of blocks is saved for the backward kernel. That kernel recomputes a group's
blocks forward into scratch memory, then runs backward, with the cotangents of the state in scratch memory. Letters as
in `types`; P: slots padded to a multiple of 8.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
from engrax.pallas_kernels.mosaic_tpu.parts import LANES, SUBLANES, VMEM_BYTES, call, scratch_like, tiled_bytes
from engrax.pallas_kernels.neural_memory.tpu_kernels import (
    MemoryForm,
    PackedBlocks,
    backward_kernel,
    block_of_step,
    forward_kernel,
)
from engrax.pallas_kernels.neural_memory.types import MemoryShapes
from engrax.pallas_kernels.neural_memory.vjp import Blocks, Carry, Reset, ScanInputs, ScanOutputs, ScanPlan
from engrax.pallas_kernels.passes import Passes, pull_back


def unsupported(shapes: MemoryShapes) -> str | None:
    """Returns why these kernels cannot serve a call, or None if they can."""
    if shapes.dtype != jnp.float32:
        return f"the TPU kernel computes in float32, not {jnp.dtype(shapes.dtype)}"
    if shapes.slots > LANES:
        return f"the TPU kernel takes chunks of up to {LANES} tokens, not {shapes.slots}"
    if len(shapes.layers) > 2:
        return f"the TPU kernel takes memories of 1 or 2 layers, not {len(shapes.layers)}"
    need = _vmem_bytes(shapes)
    if need > VMEM_BYTES:
        return f"the TPU kernel would need {need >> 20} MiB of VMEM for this memory, more than {VMEM_BYTES >> 20}"
    return None


def _vmem_bytes(shapes: MemoryShapes) -> int:
    """Returns an estimate for the backward kernel; inputs and outputs are double-buffered."""
    matrix = sum(tiled_bytes(i, o) for i, o in shapes.layers)  # one copy of the weights
    rows = sum(tiled_bytes(shapes.slots, i) + tiled_bytes(shapes.slots, o) for i, o in shapes.layers)
    moved = 3 + 2 + 3 + 3 + 2  # states, reset, cotangents in and out, of the reset
    scratch = 3 + 3 * shapes.group
    values = 24  # observed copies that the compiler keeps besides
    return matrix * (2 * moved + scratch + values) + 16 * rows + 12 * tiled_bytes(shapes.slots, shapes.slots)


def scan(plan: ScanPlan, inputs: ScanInputs) -> ScanOutputs:
    """Runs all blocks; their number is a multiple of `plan.group`. Returns (out, carry)."""
    blocks, carry, reset = inputs
    out, carry = _scan(_form(plan, inputs), _pack(blocks), carry, reset)
    return _own_slots(blocks, out), carry


def forward(plan: ScanPlan, inputs: ScanInputs) -> tuple[ScanOutputs, Carry]:
    """Returns (out, carry) and the carries at the starts of groups."""
    blocks, carry, reset = inputs
    (out, carry), (_, starts, _) = _scan_fwd(_form(plan, inputs), _pack(blocks), carry, reset)
    return (_own_slots(blocks, out), carry), starts


def backward(plan: ScanPlan, inputs: ScanInputs, starts: Carry, cotangents: ScanOutputs) -> ScanInputs:
    """Returns the cotangents of the inputs."""
    blocks, _, reset = inputs
    out_bar, bars = cotangents
    out_bar = jnp.pad(out_bar, [(0, 0)] * 3 + [(-blocks.k.shape[3] % SUBLANES, 0), (0, 0)])
    residuals = (_pack(blocks), starts, reset)
    tokens_bar, carry_bar, reset_bar = _scan_bwd(_form(plan, inputs), residuals, (out_bar, bars))
    return ScanInputs(pull_back(_pack, blocks, tokens_bar), carry_bar, reset_bar)


passes = Passes(forward, backward, scan)


def _form(plan: ScanPlan, inputs: ScanInputs) -> MemoryForm:
    return MemoryForm(
        activation=plan.activation,
        bases=1 if inputs.reset is None else 2,
        scaled=inputs.blocks.coefficients.anchor is not None,
        phased=inputs.blocks.fresh is not None,
        group=plan.group,
        interpret=plan.interpret,
    )


def _own_slots(blocks: Blocks, out):
    """Returns the outputs without the slots that `_pack` adds in front."""
    return out[..., out.shape[3] - blocks.k.shape[3] :, :]


def _pack(blocks: Blocks) -> PackedBlocks:
    """Lays out the coefficients of a block as a table, since a column would take the memory of 128."""
    c, slots = blocks.coefficients, blocks.k.shape[3]
    padding = -slots % SUBLANES

    def pad(x, *axes):  # in front
        return jnp.pad(x, [(padding if axis in axes else 0, 0) for axis in range(x.ndim)]) if padding else x

    def rows(x):  # [N, B, H, S, R] to two rows of P lanes
        x = jnp.zeros((*blocks.k.shape[:4], 0), blocks.k.dtype) if x is None else x
        return pad(jnp.pad(jnp.swapaxes(x, -1, -2), [(0, 0)] * 3 + [(0, 2 - x.shape[-1]), (0, 0)]), 4)

    def flag(x):  # [N, B] to [N, B, H, 1]
        x = jnp.zeros(blocks.k.shape[:2], bool) if x is None else x
        return jnp.broadcast_to(x[:, :, None, None], (*blocks.k.shape[:3], 1)).astype(blocks.k.dtype)

    last = jnp.pad(c.last_momentum, [(0, 0)] * 3 + [(0, 2 - c.last_momentum.shape[-1])])
    rest = jnp.concatenate([last, flag(blocks.fresh), flag(blocks.begins)], axis=-1)
    rest = jnp.pad(rest, [(0, 0)] * 3 + [(0, slots + padding - rest.shape[-1])])
    columns = [rows(x) for x in (c.anchor, c.read_weights, c.read_momentum)]
    table = jnp.concatenate([*columns, pad(c.last_write, 3)[..., None, :], rest[..., None, :]], axis=-2)
    squares = [pad(x, 3, 4) for x in (c.write, blocks.first_scores)]
    return PackedBlocks(table, *squares, *(pad(x, 3) for x in (blocks.q, blocks.k, blocks.v)))


_TOKENS, _STATE = (
    "NBHSS",
    "BHIO",
)  # the axes of per-block and of constant arrays, for `shard_over_batch_and_heads`


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(form: MemoryForm, tokens: PackedBlocks, carry: Carry, reset: Reset):
    run = shard_over_batch_and_heads(partial(_forward, form, False), (_TOKENS, _STATE, _STATE), (_TOKENS, _STATE, None))
    out, final, _ = run(tokens, carry, reset)
    return out, final


def _scan_fwd(form: MemoryForm, tokens: PackedBlocks, carry: Carry, reset: Reset):
    run = shard_over_batch_and_heads(
        partial(_forward, form, True), (_TOKENS, _STATE, _STATE), (_TOKENS, _STATE, _TOKENS)
    )
    out, final, starts = run(tokens, carry, reset)
    return (out, final), (tokens, starts, reset)


def _scan_bwd(form: MemoryForm, residuals, cotangents):
    dims = (_TOKENS, _TOKENS, _STATE, _TOKENS, _STATE)
    return shard_over_batch_and_heads(partial(_backward, form), dims, (_TOKENS, _STATE, _STATE))(
        *residuals, *cotangents
    )


_scan.defvjp(_scan_fwd, _scan_bwd)


def _by_block(x, index):
    return pl.BlockSpec((None, None, None, *x.shape[3:]), index)


def _by_head(x):  # the same for all blocks of a row and head
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, h, *_: (b, h, 0, 0))


def _specs(tree, spec, *args):
    return jax.tree.map(lambda x: spec(x, *args), tree)


def _like(tree, *lead):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), tree)


def _forward(form: MemoryForm, save: bool, tokens: PackedBlocks, carry: Carry, reset: Reset):
    """Returns (out, final carry, carries at the starts of groups or None)."""
    count, batch, heads = tokens.q.shape[:3]

    def block(b, h, n):
        return n, b, h, 0, 0

    def group(b, h, n):
        return lax.div(n, form.group), b, h, 0, 0  # `//` needs the sign of n, whose lowering needs a device

    kept = carry if form.phased else (*carry[:2], ())  # else every block's anchor is its first weights
    starts = _like(kept, count // form.group) if save else None
    return call(
        partial(forward_kernel, form),
        name="neural_memory_forward",
        grid=(batch, heads, count),
        parallel=2,
        inputs=(tokens, kept, reset),
        in_specs=(_specs(tokens, _by_block, block), _specs(kept, _by_head), _specs(reset, _by_head)),
        outputs=(_like(tokens.v), _like(carry), starts),
        out_specs=(_by_block(tokens.v, block), _specs(carry, _by_head), _specs(starts, _by_block, group)),
        scratch=(scratch_like(kept),),
        interpret=form.interpret,
    )


def _backward(form: MemoryForm, tokens: PackedBlocks, starts, reset: Reset, out_bar, bars: Carry):
    """Returns the cotangents of (tokens, carry, reset)."""
    count, batch, heads = tokens.q.shape[:3]
    groups, steps = count // form.group, 2 * form.group - 1

    def group(b, h, g, i):
        return groups - 1 - g, b, h, 0, 0

    def block(b, h, g, i):
        return (groups - 1 - g) * form.group + block_of_step(form, i), b, h, 0, 0

    def written(b, h, g, i):  # while the group runs forward: the first block written on the way back
        return (groups - 1 - g) * form.group + jnp.minimum(form.group - 1, steps - 1 - i), b, h, 0, 0

    return call(
        partial(backward_kernel, form),
        name="neural_memory_backward",
        grid=(batch, heads, groups, steps),
        parallel=2,
        inputs=(tokens, starts, reset, out_bar, bars),
        in_specs=(
            _specs(tokens, _by_block, block),
            _specs(starts, _by_block, group),
            _specs(reset, _by_head),
            _by_block(out_bar, written),
            _specs(bars, _by_head),
        ),
        outputs=_like((tokens, bars, reset)),
        out_specs=(_specs(tokens, _by_block, written), _specs(bars, _by_head), _specs(reset, _by_head)),
        scratch=(scratch_like(starts, form.group), scratch_like(bars)),
        interpret=form.interpret,
    )
