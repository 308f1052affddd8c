"""Lightning attention (arXiv 2401.04658; gate and norm as in arXiv 2501.08313):

    S_t = lambda_h S_{t-1} + k_t v_t^T,  o_t = q_t S_t,  log lambda_h = -(8 / H) (1 - layer / layers) h
    y_t = W_o (norm(o_t) * sigmoid(x_t W_gate))

with SiLU on q, k and v. The decays are fixed, slower in later layers.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.layers.common.matrix_memory import MatrixMemory, MatrixMemoryConfig
from engrax.layers.mixer import MIXERS


@MIXERS.register("lightning")
@dataclasses.dataclass(frozen=True)
class LightningConfig(MatrixMemoryConfig):
    """Settings of lightning attention."""

    output_gate: bool = True  # whether the read is gated by a projection of the input

    exempt_from: ClassVar[dict[str, str]] = {
        "trainability": "the published decays are fixed: stop-gradient on the place of the layer among the layers"
    }

    def of_heads(self, shares: int) -> None:
        """None: a head's decay follows from its place among all heads."""
        return None

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Lightning":
        return Lightning(self, dim, rngs=rngs, layer=layer, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["LightningConfig", ...]:
        return cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8, conv_width=4), cls()


class Lightning(MatrixMemory):
    """The module of LightningConfig."""

    gate_activation = staticmethod(jax.nn.sigmoid)

    def __init__(self, config: LightningConfig, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        # Layers are built under vmap, so only parameters can depend on the layer.
        self.depth = nnx.Param(jnp.full((1,), 1 - layer / num_layers, jnp.float32), axes=("layer",), role="constant")

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v = (jax.nn.silu(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        heads = v.shape[2]
        depth = jnp.clip(jax.lax.stop_gradient(self.depth[...]), 0, 1).astype(self.wide_dtype())
        log_decay = -(8 / heads) * depth * jnp.arange(heads)
        return q, k, v, {"g": jnp.broadcast_to(log_decay, v.shape[:3])}
