"""Kimi Delta Attention, KDA (arXiv 2510.26692):

    S = diag(alpha_t) S_{t-1},  S_t = S + beta_t k_t (v_t - S^T k_t)^T,  o_t = q_t S_t / sqrt(K)
    alpha_t = exp(-exp(A) softplus(x_t W_1 W_2 + b)) per channel,  beta_t = sigmoid(x_t W_beta)
    y_t = W_o (norm(o_t) * sigmoid(x_t W_3 W_4))

with q = silu(conv(x W_q)) / |.|, k alike and v = silu(conv(x W_v)): Gated DeltaNet with a decay for each channel of
the keys; W_1 W_2 and W_3 W_4 are low-rank.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from engrax.layers.common.gates import DecayGate, LowRank
from engrax.layers.delta.deltanet import DeltaNet, DeltaNetConfig
from engrax.layers.mixer import MIXERS


@MIXERS.register("kda")
@dataclasses.dataclass(frozen=True)
class KDAConfig(DeltaNetConfig):
    """Settings of Kimi Delta Attention."""

    output_gate: bool = True  # whether the read is gated by a low-rank projection of the input
    gate_rank: int | None = None  # channels inside the low-rank projections of the gates; None = head_dim

    def __post_init__(self):
        super().__post_init__()
        if self.gate_rank is not None:
            self.at_least_one("gate_rank")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "KDA":
        return KDA(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["KDAConfig", ...]:
        return cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, gate_rank=3), cls()

    @property
    def rank(self) -> int:
        """Channels inside the low-rank projections."""
        return self.gate_rank or self.head_dim

    def gate_multiplies(self, dim: int) -> int:
        heads = self.values[0]
        return dim * heads + self.rank * (dim + heads * self.head_dim)

    def output_multiplies(self, dim: int) -> int:
        return dim * self.widths[2] + self.output_gate * self.rank * (dim + self.widths[2])


class KDA(DeltaNet):
    """The module of KDAConfig."""

    gate_activation = staticmethod(jax.nn.sigmoid)

    def __init__(self, config: KDAConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        heads, value = config.values
        self.decay = DecayGate(dim, heads, rngs=rngs, channels=config.head_dim, rank=config.rank)
        if config.output_gate:
            self.gate = LowRank(dim, config.rank, heads * value, rngs=rngs)

    def gate_projections(self):
        return super().gate_projections() | {"g": self.decay.project}

    def gates(self, logits):
        g_BTHK, _ = self.decay.from_logits(logits["g"], self.wide_dtype())
        return super().gates(logits) | {"g": g_BTHK}
