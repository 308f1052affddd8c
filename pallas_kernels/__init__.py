"""Operations of engrax: pure functions of arrays, one folder each, with one reference and several implementations.

`available(op)` says which implementations can run in this process and why the others cannot. `debug_checks(True)` turns
on reports of positive log-decay gates.
"""

from engrax.pallas_kernels.common.validation import debug_checks
from engrax.pallas_kernels.dispatch import Availability, available
from engrax.pallas_kernels.gated_delta_rule.api import gated_delta_rule
from engrax.pallas_kernels.grouped_matmul.api import grouped_matmul
from engrax.pallas_kernels.hopfield_retrieval.api import hopfield_energy, hopfield_retrieval
from engrax.pallas_kernels.linear_attention.api import linear_attention
from engrax.pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from engrax.pallas_kernels.neural_memory.api import neural_memory
from engrax.pallas_kernels.neural_memory.types import NeuralMemoryState
from engrax.pallas_kernels.softmax_attention.api import softmax_attention

__all__ = [
    "Availability",
    "NeuralMemoryState",
    "available",
    "debug_checks",
    "gated_delta_rule",
    "grouped_matmul",
    "hopfield_energy",
    "hopfield_retrieval",
    "linear_attention",
    "linear_cross_entropy",
    "neural_memory",
    "softmax_attention",
]
