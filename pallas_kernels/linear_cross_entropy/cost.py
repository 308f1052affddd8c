"""FLOPs and bytes of the cross entropy of a linear head; D features, V the size of the vocabulary."""

from engrax.pallas_kernels.common.cost import Cost


def flops(*, batch: int, seq: int, features: int, vocabulary: int) -> Cost:
    """Returns the operations of matrix products: 2 D V per token for the logits; backward, the logits and two more."""
    products = 2.0 * batch * seq * features * vocabulary
    return Cost(products, 3 * products)


def traffic_bytes(*, batch: int, seq: int, features: int, vocabulary: int, itemsize: int = 2) -> Cost:
    """Returns the least bytes moved: hidden states, embedding and losses once; backward their cotangents too."""
    arrays = itemsize * features * (batch * seq + vocabulary)
    losses = 4 * batch * seq
    return Cost(float(arrays + losses), float(2 * arrays + 2 * losses))


def saved_bytes(*, batch: int, seq: int) -> int:
    """Returns the bytes saved for the backward pass, besides inputs and outputs: one number per token."""
    return 4 * batch * seq


def temporary_bytes(*, batch: int, seq: int, chunk_size: int = 1024) -> int:
    """Returns the bytes of the float32 logits in memory at once."""
    return 4 * batch * seq * chunk_size
