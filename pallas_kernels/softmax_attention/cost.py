"""FLOPs and bytes of softmax attention, for rooflines. A multiply and an add are two operations."""

from engrax.pallas_kernels.common.cost import Cost


def flops(*, batch: int, seq: int, heads: int, key: int, window: int | None = None, groups: int | None = None) -> Cost:
    """Returns the operations of the matrix products that the keys in sight need.

    K is the channels of a head. Forward: scores and their product with the values, 4 K per query head and pair of query
    and key. Backward: scores again, and the cotangents of weights, queries, keys and values, 10 K.
    """
    seen = min(window or seq, seq)
    pairs = batch * heads * (seen * (seen + 1) / 2 + (seq - seen) * seen)
    return Cost(4.0 * key * pairs, 10.0 * key * pairs)


def traffic_bytes(
    *,
    batch: int,
    seq: int,
    heads: int,
    key: int,
    window: int | None = None,
    groups: int | None = None,
    itemsize: int = 2,
) -> Cost:
    """Returns the least bytes moved: q, k, v and the output once; backward also the output's and their cotangents.

    groups: heads of k and v; None: `heads`.
    """
    queries, keys = batch * seq * heads * key * itemsize, batch * seq * (groups or heads) * key * itemsize
    return Cost(float(2 * queries + 2 * keys), float(4 * queries + 4 * keys))


def saved_bytes(*, batch: int, seq: int, heads: int) -> int:
    """Returns the bytes a kernel saves for the backward pass, besides inputs and outputs: the log of every sum."""
    return 4 * batch * seq * heads
