"""FLOPs and bytes of the grouped product that are needed: of the rows that hold something, once each."""

from engrax.pallas_kernels.common.cost import Cost


def flops(*, batch: int, seq: int, owners: int, features: int, outputs: int) -> Cost:
    """Returns the operations of matrix products, 2 D E per row, backward twice as many. seq: rows per batch row."""
    products = 2.0 * batch * seq * features * outputs
    return Cost(products, 2 * products)


def traffic_bytes(*, batch: int, seq: int, owners: int, features: int, outputs: int, itemsize: int = 2) -> Cost:
    """Returns the least bytes moved: rows, kernels and products once; backward their cotangents too."""
    rows, kernels = batch * seq, owners * features * outputs
    forward = itemsize * (rows * (features + outputs) + kernels)
    return Cost(float(forward), float(2 * forward - itemsize * rows * outputs))
