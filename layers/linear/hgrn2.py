"""HGRN2: a gated linear recurrence with a matrix as state (arXiv 2404.07904):

    f_t = b + (1 - b) sigmoid(x_t W_f),  S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  o_t = silu(x_t W_q) S_t / sqrt(K)
    y_t = W_o norm(o_t)

that is GLA whose keys are 1 - f. The lower bound b of the forget gate is learned per channel and starts at
layer / layers. (Published models learn it for all layers together, as a cumulative softmax with that start, and hold
the first layer's at 0, where it starts here at 1 %.) Without it b = 0.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.errors import UserError
from engrax.layers.common.matrix_memory import MatrixMemory, MatrixMemoryConfig
from engrax.layers.mixer import MIXERS

LEAST_BOUND, MOST_BOUND = 0.01, 0.99  # a bound at the start: 0 and 1 have no logit


@MIXERS.register("hgrn2")
@dataclasses.dataclass(frozen=True)
class HGRN2Config(MatrixMemoryConfig):
    """Settings of HGRN2; a head's keys are its forget gates, so it has as many value heads."""

    bounded: bool = True  # whether the forget gate has a lower bound

    def __post_init__(self):
        super().__post_init__()
        if self.values[0] != self.heads:
            raise UserError(f"value_heads={self.value_heads} must be heads={self.heads}: HGRN2's keys are its gates.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "HGRN2":
        return HGRN2(self, dim, rngs=rngs, layer=layer, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["HGRN2Config", ...]:
        return cls(heads=2, head_dim=4, value_dim=6, chunk_size=8, conv_width=4, output_gate=True), cls()


class HGRN2(MatrixMemory):
    """The module of HGRN2Config."""

    norm_width = "all"

    def __init__(self, config: HGRN2Config, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        if not config.bounded:
            return
        start = jnp.clip(layer / num_layers, LEAST_BOUND, MOST_BOUND)
        bound = jnp.log(start) - jnp.log1p(-start)
        self.forget_bound = nnx.Param(
            jnp.full((config.heads, config.head_dim), bound), axes=("heads", "gate"), role="gate"
        )

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        wide = self.wide_dtype()
        forget = k_BTHK.astype(wide)
        if not self.config.bounded:
            k = jax.nn.sigmoid(-forget).astype(v_BTHV.dtype)
            return jax.nn.silu(q_BTHK), k, v_BTHV, {"g": jax.nn.log_sigmoid(forget)}
        bound = self.forget_bound[...].astype(wide)
        # In logarithms throughout: log(b + (1 - b) f) and 1 - f = (1 - b) sigmoid(-logit) lose no digits near 0 and 1.
        g = jnp.logaddexp(jax.nn.log_sigmoid(bound), jax.nn.log_sigmoid(-bound) + jax.nn.log_sigmoid(forget))
        k = jax.nn.sigmoid(-bound) * jax.nn.sigmoid(-forget)
        return jax.nn.silu(q_BTHK), k.astype(v_BTHV.dtype), v_BTHV, {"g": g}
