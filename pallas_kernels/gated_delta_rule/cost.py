"""FLOPs and bytes of the chunkwise form, for rooflines and the tables printed before a run.

K and V are the features of keys and values, C the chunk. A multiply and an add are two operations. Matrix products are
counted as executed, with dense C x C products, each once. (The XLA form computes the products with X twice for bfloat16
tokens, and that of the keys with themselves twice for float32.) Bytes are those of one fused pass with the state on
chip: every input read once, every output written once.
"""

from engrax.pallas_kernels.common.cost import Cost, gate_width
from engrax.pallas_kernels.gated_delta_rule.inverse import BASE

GATE_BYTES = STATE_BYTES = INVERSE_BYTES = 4  # float32


def flops(
    *, batch: int, seq: int, heads: int, key: int, value: int, chunk_size: int = 64, query_heads: int | None = None
) -> Cost:
    """Returns the operations of matrix products. heads: of values; query_heads: of queries and keys (default: heads).

    Forward, per token and value head: state, read and write 6 K V; w, u and scores times written values C (2 K + 4 V);
    the inverse (`inverse_flops`); per query head scores of queries and of keys 4 C K.
    Backward, per value head: states again, their cotangents and those of q, k and v through them, 20 K V; w and u again
    and the cotangents of X, scores and values C (4 K + 12 V), of q and k through the scores 6 C K; per query head
    scores again 4 C K. There is no inverse.
    The extra cost of one gate per channel is not counted: scores per value head and per halving of the chunk, and in
    the GPU kernels the sums of the gates (`mosaic_gpu.channel`).
    """
    chunk, queries = min(seq, chunk_size), query_heads or heads
    forward = heads * (6 * key * value + chunk * (2 * key + 4 * value) + inverse_flops(chunk) / chunk)
    backward = heads * (20 * key * value + chunk * (10 * key + 12 * value))
    scores = queries * 4 * chunk * key
    return Cost(float(batch * seq * (forward + scores)), float(batch * seq * (backward + scores)))


def inverse_flops(chunk: int) -> float:
    """Returns the operations of one inverse: substitution in blocks of `inverse.BASE`, then two products per pair.

    The ladder in the kernels takes 4 C^3 per halving instead.
    """
    size, length = min(BASE, 1 << (chunk - 1).bit_length()), 1 << (chunk - 1).bit_length()
    total = 2.0 * length * size * size
    while size < length:
        total += length / (2 * size) * 4 * size**3
        size *= 2
    return total


def traffic_bytes(
    *,
    batch: int,
    seq: int,
    heads: int,
    key: int,
    value: int,
    gate: str = "scalar",
    chunk_size: int = 64,
    itemsize: int = 2,
    query_heads: int | None = None,
) -> Cost:
    """Returns the least bytes moved. gate: "none", "scalar" or "channel"; itemsize: of q, k, v and the output.

    Forward: q, k, v, beta and the gate in, the output out. Backward: those, the inverses and the output's cotangent in,
    the cotangents of q, k, v, beta and the gate out. The forward pass's write of the inverses counts as backward.
    """
    queries, gates = query_heads or heads, heads * (1 + gate_width(gate, key)) * GATE_BYTES
    states = 2 * batch * heads * key * value * STATE_BYTES
    saved = saved_bytes(batch=batch, seq=seq, heads=heads, chunk_size=chunk_size)
    forward = batch * seq * (itemsize * (2 * queries * key + 2 * heads * value) + gates) + states
    backward = batch * seq * (itemsize * (4 * queries * key + 3 * heads * value) + 2 * gates) + 2 * states + 2 * saved
    return Cost(float(forward), float(backward))


def state_bytes(*, batch: int, heads: int, key: int, value: int, segments: int = 1, itemsize: int = STATE_BYTES) -> int:
    """Returns the bytes of the state; each segment has one."""
    return batch * segments * heads * key * value * itemsize


def saved_bytes(*, batch: int, seq: int, heads: int, chunk_size: int = 64, **_: int) -> int:
    """Returns the bytes that the forward pass saves for the backward pass, besides inputs and outputs: the inverses."""
    return batch * seq * heads * min(seq, chunk_size) * INVERSE_BYTES
