"""Gated DeltaNet (arXiv 2412.06464):

    S = alpha_t S_{t-1},  S_t = S + beta_t k_t (v_t - S^T k_t)^T,  o_t = q_t S_t / sqrt(K)
    alpha_t = exp(-exp(A) softplus(x_t W_a + b)),  beta_t = sigmoid(x_t W_beta)
    y_t = W_o (norm(o_t) * silu(x_t W_gate))

with q = silu(conv(x W_q)) / |.|, k alike and v = silu(conv(x W_v)): DeltaNet with Mamba-2's decay.
"""

import dataclasses
from typing import Any

from flax import nnx

from engrax.layers.common.gates import DecayGate
from engrax.layers.delta.deltanet import DeltaNet, DeltaNetConfig
from engrax.layers.mixer import MIXERS


@MIXERS.register("gated_deltanet")
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(DeltaNetConfig):
    """Settings of Gated DeltaNet."""

    value_dim: int | None = 64  # value width of a head, twice the key's as published; None = head_dim
    output_gate: bool = True  # whether the read is gated by a projection of the input

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "GatedDeltaNet":
        return GatedDeltaNet(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["GatedDeltaNetConfig", ...]:
        published = dict(conv_bias=True, norm_eps=1e-5, l2_eps=1e-6)
        return cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, **published), cls()

    def gate_multiplies(self, dim: int) -> int:
        return 2 * dim * self.values[0]


class GatedDeltaNet(DeltaNet):
    """The module of GatedDeltaNetConfig."""

    def __init__(self, config: GatedDeltaNetConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.decay = DecayGate(dim, config.values[0], rngs=rngs)

    def gate_projections(self):
        return super().gate_projections() | {"g": self.decay.project}

    def gates(self, logits):
        g_BTH1, _ = self.decay.from_logits(logits["g"], self.wide_dtype())
        return super().gates(logits) | {"g": g_BTH1[..., 0]}
