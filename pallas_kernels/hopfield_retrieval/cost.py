"""FLOPs and bytes of Hopfield retrieval; `seq` states, `patterns` stored, D = `key` and V = `value` features a head."""

from engrax.pallas_kernels.common.cost import Cost


def flops(*, batch: int, seq: int, patterns: int, heads: int, key: int, value: int, steps: int = 1) -> Cost:
    """Returns the operations of matrix products: 4 N M D per update, 2 N M (D + V) for the one that reads the values.

    Backward, each update computes its scores again and four more products; the last update computes two and four.
    """
    pairs = 2.0 * batch * heads * seq * patterns
    updates, read = pairs * 2 * key * (steps - 1), pairs * (key + value)
    return Cost(updates + read, 3 * updates + pairs * (2 * key + 2 * value))


def traffic_bytes(
    *, batch: int, seq: int, patterns: int, heads: int, key: int, value: int, steps: int = 1, itemsize: int = 2
) -> Cost:
    """Returns the least bytes moved: states, patterns, values and results once; backward their cotangents too.

    values count as separate arrays.
    """
    once = itemsize * batch * heads * (seq + patterns) * (key + value)
    return Cost(float(once), float(2 * once))


def saved_bytes(*, batch: int, seq: int, heads: int, key: int, steps: int = 1, implicit: bool = False) -> int:
    """Returns the bytes saved for the backward pass, besides inputs: the states between updates, or only the last."""
    return 4 * batch * seq * heads * key * (1 if implicit else steps - 1)
