"""The scan over blocks as GPU kernels (compute capability 9.0), for memories of one or two layers.

Products have bfloat16 operands and accumulate in float32, so the kernels serve calls with bfloat16 q, k and v. Weights,
momentum, gates and their gradients are float32. One layer has four kernels, in `gpu_kernels` and `gpu_chunks` (two
layers: see `gpu_two_layers`):

    forward            weights and momentum stay on chip from the first chunk to the last
    backward_states    the same without queries: recomputes the errors and the matrices at the start of every chunk
    backward_carry     the cotangents of the matrices, from the last chunk to the first, and that of v
    backward_tokens    the cotangents of q, k and the coefficients, for all chunks at once

If rows are at unknown phases, the first block may continue a chunk and the last may be empty, so these two use the XLA
form. A segment that begins at a chunk's first token starts the chunk with the reset state. If one begins later in a
chunk, every chunk of the call is visited twice (`gpu_scan`).

Only the inputs and the matrices between these parts are saved for the backward pass (`save_every` has no effect).
During the backward pass, each chunk's matrices, their rounding errors and their cotangents are in memory as bfloat16:
12 K V bytes per chunk and head for a one-layer memory, twice that with segments.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, MOST_PROGRAMS, SIZES, SMEM_BYTES
from engrax.pallas_kernels.neural_memory import gpu_kernels, gpu_two_layers
from engrax.pallas_kernels.neural_memory.gpu_chunks import chunk_gradients
from engrax.pallas_kernels.neural_memory.gpu_kernels import RESET, PackedTokens
from engrax.pallas_kernels.neural_memory.gpu_scan import FinalMatrices, MatrixPasses, by_chunks
from engrax.pallas_kernels.neural_memory.gpu_two_layers_kernels import TILE, smem_bytes
from engrax.pallas_kernels.neural_memory.types import MemoryShapes
from engrax.pallas_kernels.neural_memory.vjp import (
    Blocks,
    Carry,
    ScanInputs,
    ScanOutputs,
    ScanPlan,
    mask_rows,
    select_rows,
)
from engrax.pallas_kernels.neural_memory.vjp import scan_blocks as xla_scan_blocks
from engrax.pallas_kernels.passes import Passes, pull_back


def unsupported(shapes: MemoryShapes) -> str | None:
    """Returns why these kernels cannot serve a call, or None if they can."""
    if len(shapes.layers) > 2:
        return f"the GPU kernel takes memories of 1 or 2 layers, not {len(shapes.layers)}"
    if shapes.tokens != jnp.bfloat16 or shapes.dtype != jnp.float32:
        return f"the GPU kernel takes bfloat16 q, k and v and a float32 state, not {shapes.tokens} and {shapes.dtype}"
    if message := _unsupported_sizes(*shapes.layers):
        return message
    if shapes.slots != CHUNK:
        return f"the GPU kernel takes chunks of {CHUNK} tokens and at least one chunk, not blocks of {shapes.slots}"
    if not shapes.aligned and shapes.blocks < 3:
        return f"the GPU kernel takes rows at unknown phases from {CHUNK + 2} tokens on"
    if max(shapes.batch, shapes.heads) > MOST_PROGRAMS:
        return f"the GPU kernel takes at most {MOST_PROGRAMS} rows and heads"
    return None


def _unsupported_sizes(first: tuple[int, int], second: tuple[int, int] | None = None) -> str | None:
    (key, hidden), value = first, (second or first)[1]
    if key not in SIZES or value not in SIZES:
        return f"the GPU kernel takes K and V of {SIZES[0]} or {SIZES[1]}, not {key} and {value}"
    if second is None:
        return None
    if hidden % TILE:
        return f"the GPU kernel takes hidden features in multiples of {TILE}, not {hidden}"
    need = smem_bytes(key, hidden, value)
    if need > SMEM_BYTES:
        sizes = f"K = {key}, {hidden} hidden features and V = {value}"
        return f"the GPU kernel would need {need >> 10} KiB of shared memory for {sizes}, more than 227 KiB"
    if (key, value) != (TILE, TILE):  # with 128, ptxas spilled 324 bytes of the forward sweep
        wanted = f"K and V of {TILE} (128 take more than a thread's 255 registers)"
        return f"the GPU kernel takes 2 layers with {wanted}, not {key} and {value}"
    return None


def forward(plan: ScanPlan, inputs: ScanInputs) -> tuple[ScanOutputs, list[Carry]]:
    """Returns (out, carry) and the carries before every part except the first."""
    blocks, carry, reset = inputs
    outs, carries = [], []
    for part, run in _parts(plan, blocks):
        out, carry = run.forward(plan, ScanInputs(_part(blocks, part), carry, reset))
        outs.append(out)
        carries.append(carry)
    return (jnp.concatenate(outs) if len(outs) > 1 else outs[0], carry), carries[:-1]


def backward(plan: ScanPlan, inputs: ScanInputs, carries: list[Carry], cotangents: ScanOutputs) -> ScanInputs:
    """Returns the cotangents of the inputs."""
    blocks, carry, reset = inputs
    (out_bar, carry_bar), bars, reset_bar = cotangents, [], jax.tree.map(jnp.zeros_like, reset)
    for (part, run), start in zip(reversed(_parts(plan, blocks)), reversed([carry, *carries])):
        inputs = ScanInputs(_part(blocks, part), start, reset)
        bar, carry_bar, more = run.backward(plan, inputs, (out_bar[part], carry_bar))
        bars.insert(0, bar)
        reset_bar = jax.tree.map(jnp.add, reset_bar, more)
    blocks_bar = jax.tree.map(lambda *x: jnp.concatenate(x), *bars) if len(bars) > 1 else bars[0]
    return ScanInputs(blocks_bar, carry_bar, reset_bar)


passes = Passes(forward, backward)


class _Run(NamedTuple):
    """forward(plan, inputs) -> (out, carry); backward(plan, inputs, cotangents) -> cotangents of the inputs."""

    forward: Callable
    backward: Callable


def _parts(plan: ScanPlan, blocks: Blocks) -> list[tuple[slice, _Run]]:
    """Returns, in order, which blocks the kernels run and which the XLA form runs."""
    if plan.aligned or blocks.fresh is None:
        return [(slice(None), BY_KERNEL)]
    count = blocks.k.shape[0]
    parts = [(0, 1, BY_XLA), (1, count - 1, BY_KERNEL), (max(1, count - 1), count, BY_XLA)]
    return [(slice(first, last), run) for first, last, run in parts if first < last]


def _part(blocks: Blocks, part: slice) -> Blocks:
    return jax.tree.map(lambda x: x[part], blocks)


def _xla_forward(plan: ScanPlan, inputs: ScanInputs) -> ScanOutputs:
    return xla_scan_blocks(plan._replace(group=1), *inputs)


def _xla_backward(plan: ScanPlan, inputs: ScanInputs, cotangents: ScanOutputs) -> ScanInputs:
    return pull_back(partial(_xla_forward, plan), inputs, cotangents)


def _kernel_forward(plan: ScanPlan, inputs: ScanInputs) -> ScanOutputs:
    """Runs blocks that begin their chunks, so each block's anchor is its initial weights, or are empty."""
    blocks, carry, reset = inputs
    run, layout = _of_depth(carry)
    state = layout.pack_all(carry[:2]), layout.pack_all(reset)
    out, final = run.forward(plan, _pack(blocks), blocks.begun, *state[0], state[1])
    weights, momentum, anchor = (layout.unpack(matrices) for matrices in final)
    if blocks.fresh is not None:
        anchor = select_rows(blocks.fresh.any(axis=0), anchor, carry[2])
    return _to_blocks(out).astype(blocks.v.dtype), (weights, momentum, anchor)


def _kernel_backward(plan: ScanPlan, inputs: ScanInputs, cotangents: ScanOutputs) -> ScanInputs:
    blocks, carry, reset = inputs
    run, layout = _of_depth(carry)
    out_bar, bars = cotangents
    anchor_bar = jax.tree.map(jnp.zeros_like, bars[2])
    if blocks.fresh is not None:
        anchor_bar = mask_rows(~blocks.fresh.any(axis=0), bars[2])
    state = layout.pack_all(carry[:2]), layout.pack_all(reset)
    bars = FinalMatrices(*layout.pack_all(bars))
    found = run.backward(plan, _pack(blocks), blocks.begun, *state[0], state[1], _to_tokens(out_bar), bars)
    tokens_bar, weights_bar, momentum_bar, reset_bar = found
    carry_bar = layout.unpack(weights_bar), layout.unpack(momentum_bar), anchor_bar
    reset_bar = None if reset is None else tuple(map(layout.unpack, reset_bar))
    return ScanInputs(pull_back(_pack, blocks, tokens_bar), carry_bar, reset_bar)


BY_XLA, BY_KERNEL = _Run(_xla_forward, _xla_backward), _Run(_kernel_forward, _kernel_backward)


class _MatrixLayout(NamedTuple):
    """A kernel's layout of the layers' matrices. Both conversions only move entries, so they also serve cotangents."""

    pack: Callable
    unpack: Callable

    def pack_all(self, matrices):
        """Packs each of several sets of layers; None stays None."""
        return None if matrices is None else tuple(map(self.pack, matrices))


def _of_depth(carry: Carry) -> tuple[MatrixPasses, _MatrixLayout]:
    if len(carry[0]) > 1:
        return gpu_two_layers.passes, _MatrixLayout(gpu_two_layers.to_tiles, gpu_two_layers.from_tiles)
    return _one_layer, _MatrixLayout(lambda layers: layers[0], lambda matrix: (matrix,))


def _to_blocks(x):
    """Returns `[B, T, H, V]` as `[N, B, H, S, V]`."""
    batch, length, heads, features = x.shape
    return x.reshape(batch, length // CHUNK, CHUNK, heads, features).transpose(1, 0, 3, 2, 4)


def _to_tokens(x):
    """Undoes `_to_blocks`, in bfloat16."""
    blocks, batch, heads, slots, features = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(batch, blocks * slots, heads, features).astype(jnp.bfloat16)


def _pack(blocks: Blocks) -> PackedTokens:
    """Returns the kernels' inputs, with one table per base. This undoes the grid's layout, and XLA cancels the two."""
    c = blocks.coefficients
    anchor = jnp.ones_like(c.read_weights) if c.anchor is None else c.anchor
    anchors = jnp.broadcast_to(_last_fresh(blocks)[:, :, None], c.last_write.shape[:3]).astype(jnp.float32)
    rows = []
    for base in range(c.read_weights.shape[-1]):
        a, b, scale = (x[..., base] for x in (c.read_weights, c.read_momentum, anchor))
        begins = jnp.full_like(anchors, base)
        last = jnp.stack([a[..., -1], b[..., -1], c.last_momentum[..., base], begins, anchors], axis=-1)
        last = jnp.pad(last, [(0, 0)] * 3 + [(0, CHUNK - last.shape[-1])])
        rows += [a, b, scale, c.write[..., -1, :], c.last_write, last]
    tokens = (_to_tokens(x) for x in (blocks.q, blocks.k, blocks.v))
    return PackedTokens(*tokens, c.write, jnp.stack(rows, axis=-2))


def _last_fresh(blocks: Blocks):
    """Returns `[N, B]`: the last block of a row that begins its chunk, whose anchor is the row's final one."""
    if blocks.fresh is None:
        count, batch = blocks.k.shape[:2]
        return jnp.broadcast_to(jnp.arange(count)[:, None] == count - 1, (count, batch))
    return blocks.fresh & (jax.lax.cumsum(blocks.fresh.astype(jnp.int32), axis=0, reverse=True) == 1)


def _one_layer_forward(plan: ScanPlan, tokens: PackedTokens, weights, momentum, reset):
    found = gpu_kernels.forward(tokens, weights, momentum, reset, interpret=plan.interpret)
    return found["out"], FinalMatrices(found["weights"], found["momentum"], found["anchor"])


def _one_layer_backward(plan: ScanPlan, tokens: PackedTokens, weights, momentum, reset, out_bar, bars: FinalMatrices):
    """Returns the cotangents of the tokens, the weights, the momentum and the reset state."""
    again = gpu_kernels.states(tokens, weights, momentum, reset, interpret=plan.interpret)
    back = gpu_kernels.backward(tokens, again, out_bar, bars, reset is not None, interpret=plan.interpret)
    found = chunk_gradients(tokens, out_bar, again, back, interpret=plan.interpret)
    tokens_bar = PackedTokens(found["q_bar"], found["k_bar"], back["v_bar"], found["write_bar"], found["table_bar"])
    return tokens_bar, back["weights"], back["momentum"], reset and tuple(back[name] for name in RESET)


_one_layer = by_chunks(_one_layer_forward, _one_layer_backward, "BHKV")
