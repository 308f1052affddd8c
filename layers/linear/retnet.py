"""RetNet's multi-scale retention (arXiv 2307.08621):

    S_t = gamma_h S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  gamma_h = 1 - 2^(-5-h)
    y_t = W_o (norm(o_t) * silu(x_t W_gate))

Queries and keys are rotated by their positions; the decays are fixed.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.errors import UserError, require_positive
from engrax.layers.attention.attention import rotate
from engrax.layers.common.matrix_memory import MatrixMemory, MatrixMemoryConfig
from engrax.layers.mixer import MIXERS


@MIXERS.register("retnet")
@dataclasses.dataclass(frozen=True)
class RetNetConfig(MatrixMemoryConfig):
    """Settings of multi-scale retention."""

    value_dim: int | None = 64  # value width of a head, twice the key's as published; None = head_dim
    output_gate: bool = True  # whether the read is gated by a projection of the input
    rope_base: float | None = 10_000.0  # longest rotary wavelength / 2 pi, in tokens; None = no rotation

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "rope_base")
        if self.rope_base is not None and self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} is odd; rotary positions need pairs of channels (or no rope_base)."
            )

    def of_heads(self, shares: int) -> None:
        """None: a head's decay follows from its place among all heads."""
        return None

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "RetNet":
        return RetNet(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["RetNetConfig", ...]:
        return cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, conv_width=4), cls()


def retention_decay(heads: int) -> np.ndarray:
    """log gamma_h = log(1 - 2^(-5-h)), [H]."""
    return np.log1p(-(2.0 ** (-5.0 - np.arange(heads))))


class RetNet(MatrixMemory):
    """The module of RetNetConfig."""

    counts_tokens = True

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v = (self.short_activation(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        base = self.config.rope_base
        if base is not None:
            q, k = (rotate(y, place_BT, base) for y in (q, k))
        log_decay = jnp.asarray(retention_decay(v.shape[2]), self.wide_dtype())
        return q, k, v, {"g": jnp.broadcast_to(log_decay, v.shape[:3])}
