"""The scan over blocks as GPU kernels (compute capability 9.0), for a memory of one layer or two.

Products take bfloat16 operands and add in float32, so the kernels serve calls whose q, k and v are bfloat16; weights,
momentum, gates and their gradients are float32. Four kernels for one layer, in `gpu_kernels` and `gpu_chunks` (those
for two layers: `gpu_two_layers`):

    forward            weights and momentum stay on the chip from the first chunk to the last
    backward_states    the same again, without queries: the errors, and the matrices that every chunk begins with
    backward_carry     the cotangents of the matrices from the last chunk to the first, and that of v
    backward_tokens    all chunks at once: the cotangents of q, k and of the coefficients

Where rows are at unknown phases, the first block may continue a chunk and the last one may be empty: these two take the
XLA form. Beside inputs, nothing is saved for the backward pass (`save_every` changes nothing). While it runs, the
matrices of every chunk, with what rounding took from them, and their cotangents lie in memory as bfloat16: 12 K V bytes
for each chunk and head of a memory of one layer.
"""

import jax
import jax.numpy as jnp

from engrax.pallas_kernels.mosaic_gpu.parts import CHUNK, MOST_PROGRAMS, SIZES
from engrax.pallas_kernels.neural_memory import gpu_two_layers
from engrax.pallas_kernels.neural_memory.gpu_chunks import chunk_gradients
from engrax.pallas_kernels.neural_memory.gpu_kernels import PackedTokens, backward, forward, states
from engrax.pallas_kernels.neural_memory.gpu_scan import FinalMatrices, differentiable
from engrax.pallas_kernels.neural_memory.gpu_two_layers_kernels import TILE
from engrax.pallas_kernels.neural_memory.types import MemoryShapes
from engrax.pallas_kernels.neural_memory.vjp import Blocks, Carry, Reset, ScanPlan
from engrax.pallas_kernels.neural_memory.vjp import scan_blocks as xla_scan_blocks


def unsupported(shapes: MemoryShapes) -> str | None:
    """Returns why these kernels cannot serve a call, None if they can."""
    if len(shapes.layers) > 2:
        return f"the GPU kernel takes memories of 1 or 2 layers, not {len(shapes.layers)}"
    if shapes.tokens != jnp.bfloat16 or shapes.dtype != jnp.float32:
        return f"the GPU kernel takes bfloat16 q, k and v and a float32 state, not {shapes.tokens} and {shapes.dtype}"
    key, *hidden, value = shapes.layers[0][0], *(out for _, out in shapes.layers)
    if hidden and ((key, value) != (TILE, TILE) or hidden[0] not in SIZES):
        wanted = f"K, hidden features and V of {TILE}, {SIZES[0]} or {SIZES[1]}, and {TILE}"
        return f"the GPU kernel takes 2 layers with {wanted}, not {key}, {hidden[0]} and {value}"
    if key not in SIZES or value not in SIZES:
        return f"the GPU kernel takes K and V of {SIZES[0]} or {SIZES[1]}, not {key} and {value}"
    if shapes.slots != CHUNK:
        return f"the GPU kernel takes chunks of {CHUNK} tokens and at least one chunk, not blocks of {shapes.slots}"
    if not shapes.aligned and shapes.blocks < 3:
        return f"the GPU kernel takes rows at unknown phases from {CHUNK + 2} tokens on"
    if shapes.segments:
        return "the GPU kernel takes no segments"
    if max(shapes.batch, shapes.heads) > MOST_PROGRAMS:
        return f"the GPU kernel takes at most {MOST_PROGRAMS} rows and heads"
    return None


def scan_blocks(plan: ScanPlan, blocks: Blocks, carry: Carry, reset: Reset, *, interpret: bool = False):
    """Runs all blocks as `vjp.scan_blocks`. Returns (out `[N, B, H, S, V]`, the carry)."""
    if reset is not None:
        raise NotImplementedError("the GPU kernel takes no segments (see `unsupported`).")
    if blocks.fresh is None:
        return _scan_fresh(plan.activation, blocks, carry, interpret)
    outs = []

    def run(function, first: int, last: int, carry: Carry) -> Carry:
        if first < last:
            out, carry = function(jax.tree.map(lambda x: x[first:last], blocks), carry)
            outs.append(out)
        return carry

    def by_kernel(part, carry):
        return _scan_fresh(plan.activation, part, carry, interpret)

    def by_xla(part, carry):
        return xla_scan_blocks(plan._replace(group=1), part, carry, None)

    count = blocks.k.shape[0]
    carry = run(by_xla, 0, 1, carry)
    carry = run(by_kernel, 1, count - 1, carry)
    carry = run(by_xla, max(1, count - 1), count, carry)
    return jnp.concatenate(outs), carry


def _scan_fresh(activation: str, blocks: Blocks, carry: Carry, interpret: bool):
    """Runs blocks that all begin their chunks, so that every block's anchor is its first weights."""
    weights, momentum, _ = carry
    if len(weights) > 1:
        out, carry = gpu_two_layers.scan(
            gpu_two_layers.TwoLayerForm(activation, interpret), _pack(blocks), weights, momentum
        )
    else:
        out, state = _scan(interpret, _pack(blocks), *weights, *momentum)
        carry = tuple((matrix,) for matrix in state)
    return _to_blocks(out).astype(blocks.v.dtype), carry


def _to_blocks(x):
    """Returns `[B, T, H, V]` as `[N, B, H, S, V]`."""
    batch, length, heads, features = x.shape
    return x.reshape(batch, length // CHUNK, CHUNK, heads, features).transpose(1, 0, 3, 2, 4)


def _pack(blocks: Blocks) -> PackedTokens:
    c = blocks.coefficients

    def tokens(x):  # undoes the grid's layout; XLA drops the pair
        blocks, batch, heads, slots, features = x.shape
        return x.transpose(1, 0, 3, 2, 4).reshape(batch, blocks * slots, heads, features).astype(jnp.bfloat16)

    a, b = c.read_weights[..., 0], c.read_momentum[..., 0]
    anchor = jnp.ones_like(a) if c.anchor is None else c.anchor[..., 0]
    last = jnp.stack([a[..., -1], b[..., -1], c.last_momentum[..., 0]], axis=-1)
    last = jnp.pad(last, [(0, 0)] * 3 + [(0, CHUNK - last.shape[-1])])
    table = jnp.stack([a, b, anchor, c.write[..., -1, :], c.last_write, last], axis=-2)
    return PackedTokens(tokens(blocks.q), tokens(blocks.k), tokens(blocks.v), c.write, table)


def _forward(interpret: bool, tokens: PackedTokens, weights, momentum):
    found = forward(tokens, weights, momentum, interpret=interpret)
    return found["out"], FinalMatrices(found["weights"], found["momentum"], found["anchor"])


def _backward(interpret: bool, tokens: PackedTokens, weights, momentum, out_bar, bars: FinalMatrices):
    """Returns the cotangents of the tokens, the weights and the momentum."""
    again = states(tokens, weights, momentum, interpret=interpret)
    back = backward(tokens, again, out_bar, bars, interpret=interpret)
    found = chunk_gradients(tokens, out_bar, again, back, interpret=interpret)
    tokens_bar = PackedTokens(found["q_bar"], found["k_bar"], back["v_bar"], found["write_bar"], found["table_bar"])
    return tokens_bar, back["weights"], back["momentum"]


_scan = differentiable(_forward, _backward, "BHKV")
