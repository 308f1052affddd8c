"""FLOPs and bytes of the chunkwise form, for rooflines and the tables printed before a run."""

from typing import NamedTuple

from engrax.pallas_kernels.neural_memory.vjp import group_size


class Flops(NamedTuple):
    """Floating-point operations of matrix products (multiply and add count as two), forward and backward."""

    forward: float
    backward: float


def _layer_sizes(key: int, value: int, hidden: int, depth: int) -> list[tuple[int, int]]:
    sizes = [key] + [hidden] * (depth - 1) + [value]
    return list(zip(sizes, sizes[1:]))


def flops(
    *,
    batch: int,
    seq: int,
    heads: int,
    key: int,
    value: int,
    hidden: int,
    depth: int,
    chunk_size: int,
    segments: bool = False,
) -> Flops:
    """Returns the operations of one call without recomputation (`save_every=1`).

    In multiply-adds, per token and per I x O memory layer: a product with a base's matrix costs I O. Forward: keys 1,
    plus 1 to propagate the error (not in the first layer); read 2 (weights, momentum); carry 2. With a second base
    (`segments`), keys and read double. Inside a chunk of S tokens: scores S I, and their use S O. Backward: 2 per
    forward product, including the keys' error.
    """
    slots, bases = min(seq, chunk_size), 2 if segments else 1
    total = 0
    for layer, (i, o) in enumerate(_layer_sizes(key, value, hidden, depth)):
        keys = bases * (1 if layer == 0 else 2)
        total += (keys + 2 * bases + 2) * i * o + slots * (i + o)
    total += 2 * slots  # the coefficients of the dual form: one S x S x S product per chunk, padded to two for the rest
    forward = 2.0 * total * batch * seq * heads
    return Flops(forward, 2.0 * forward)


def state_bytes(*, batch: int, heads: int, key: int, value: int, hidden: int, depth: int, itemsize: int = 4) -> int:
    """Returns the bytes of a `NeuralMemoryState`: weights, momentum and anchor, and the phase."""
    matrices = sum(i * o for i, o in _layer_sizes(key, value, hidden, depth))
    return batch * (3 * heads * matrices * itemsize + 4)


def saved_bytes(
    *,
    batch: int,
    seq: int,
    heads: int,
    key: int,
    value: int,
    hidden: int,
    depth: int,
    chunk_size: int,
    save_every: int = 1,
    itemsize: int = 4,
) -> int:
    """Returns the bytes that the forward pass saves for the backward pass, without inputs and outputs.

    Weights and momentum count once per group of chunks (`vjp.group_size`). Hidden rows (three per hidden layer, the
    error, and the scores of all layers but the first) count for every chunk if save_every is 1, else for one group at a
    time.
    """
    slots = min(seq, chunk_size)
    chunks = -(-seq // slots)
    group = group_size(chunks, slots, save_every)
    matrices = 2 * sum(i * o for i, o in _layer_sizes(key, value, hidden, depth))
    rows = slots * (3 * hidden * (depth - 1) + value + slots * (depth - 1))
    states = -(-chunks // group) + group - 1
    return batch * heads * itemsize * (states * matrices + (chunks if save_every == 1 else group) * rows)


def traffic_bytes(
    *,
    batch: int,
    seq: int,
    heads: int,
    key: int,
    value: int,
    hidden: int,
    depth: int,
    chunk_size: int,
    itemsize: int = 4,
) -> Flops:
    """Returns the least bytes moved, forward and backward: tokens once, weights and momentum in and out per chunk."""
    chunks = -(-seq // min(seq, chunk_size))
    tokens = batch * seq * heads * (2 * key + 2 * value + 3) * itemsize
    states = 2 * 2 * chunks * batch * heads * sum(i * o for i, o in _layer_sizes(key, value, hidden, depth)) * itemsize
    return Flops(float(tokens + states), float(2 * tokens + 2 * states))
