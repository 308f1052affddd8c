"""Operations of engrax: pure functions of arrays, one folder each, one reference and several implementations.

`available(op)` says which implementations can run in this process and why the others cannot.
"""

from typing import NamedTuple

from engrax.pallas_kernels import neural_memory as _neural_memory_op
from engrax.pallas_kernels.neural_memory.api import neural_memory
from engrax.pallas_kernels.neural_memory.types import NeuralMemoryState

__all__ = ["Availability", "NeuralMemoryState", "available", "neural_memory"]

_OPERATIONS = {"neural_memory": _neural_memory_op}


class Availability(NamedTuple):
    """What `available` returns: the implementations that can run here, and for the others the reason."""

    names: tuple[str, ...]
    missing: dict[str, str]


def available(op: str) -> Availability:
    """Returns the implementations of operation `op` that can run here, and for the others the reason.

    Raises ValueError for an unknown operation.
    """
    if op not in _OPERATIONS:
        raise ValueError(f"unknown operation {op!r} (known: {', '.join(sorted(_OPERATIONS))}).")
    module = _OPERATIONS[op]
    return Availability(tuple(module.IMPLEMENTATIONS), dict(module.MISSING))
