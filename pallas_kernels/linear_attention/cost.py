"""FLOPs and bytes of the chunkwise form, for rooflines and the tables printed before a run.

K and V are the features of keys and values, C the chunk. A multiply and an add are two operations. Matrix products are
counted as executed, with dense C x C products. Bytes are those of one fused pass with the state on chip: every input
read once, every output written once.
"""

from engrax.pallas_kernels.common.cost import Cost, gate_width

GATE_BYTES = STATE_BYTES = 4  # float32


def flops(
    *, batch: int, seq: int, heads: int, key: int, value: int, chunk_size: int = 64, query_heads: int | None = None
) -> Cost:
    """Returns the operations of matrix products. heads: of values; query_heads: of queries and keys (default: heads).

    Forward, per token and value head: read and write 4 K V, scores with values 2 C V; per query head scores 2 C K.
    Backward, per value head: states again, their cotangents and those of q, k and v through them, 10 K V; cotangents
    of scores and values 4 C V; per query head scores again and the cotangents of q and k through them, 6 C K.
    The extra cost of one gate per channel is not counted: scores per value head and per halving of the chunk, and in
    the GPU kernels the sums of the gates (`mosaic_gpu.channel`).
    """
    chunk, queries = min(seq, chunk_size), query_heads or heads
    forward = heads * (4 * key * value + 2 * chunk * value) + queries * 2 * chunk * key
    backward = heads * (10 * key * value + 4 * chunk * value) + queries * 6 * chunk * key
    return Cost(float(batch * seq * forward), float(batch * seq * backward))


def traffic_bytes(
    *,
    batch: int,
    seq: int,
    heads: int,
    key: int,
    value: int,
    gate: str = "scalar",
    itemsize: int = 2,
    query_heads: int | None = None,
) -> Cost:
    """Returns the least bytes moved. gate: "none", "scalar" or "channel"; itemsize: of q, k, v and the output.

    Forward: q, k, v and the gate in, the output out. Backward: q, k, v, the output's cotangent and the gate in, the
    cotangents of q, k, v and the gate out.
    """
    queries, gates = query_heads or heads, heads * gate_width(gate, key) * GATE_BYTES
    states = 2 * batch * heads * key * value * STATE_BYTES
    forward = batch * seq * (itemsize * (2 * queries * key + 2 * heads * value) + gates) + states
    backward = batch * seq * (itemsize * (4 * queries * key + 3 * heads * value) + 2 * gates) + 2 * states
    return Cost(float(forward), float(backward))


def state_bytes(*, batch: int, heads: int, key: int, value: int, segments: int = 1, itemsize: int = STATE_BYTES) -> int:
    """Returns the bytes of the state; each segment has one."""
    return batch * segments * heads * key * value * itemsize


def saved_bytes(**_: int) -> int:
    """Returns the bytes that the forward pass saves for the backward pass, besides inputs and outputs: none."""
    return 0
