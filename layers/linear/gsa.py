"""Gated slot attention, GSA (arXiv 2409.07146): a bounded memory of M slots, read with a softmax.

    K_t = diag(alpha_t) K_{t-1} + (1 - alpha_t) k_t^T,  V_t = diag(alpha_t) V_{t-1} + (1 - alpha_t) v_t^T
    o_t = V_t^T softmax(K_t q_t),  alpha_t = sigmoid(x_t W_alpha)^(1/8),  y_t = W_o norm(silu(o_t))

with SiLU on q, k and v. These are two passes of linear attention. In the first, the decay acts on the value axis, not
on the keys: every slot is a value head of width 1 with its own decay. In the second, 1 - alpha are the keys and the
softmax gives the queries.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.errors import UserError
from engrax.layers.common.matrix_memory import Matrix, MatrixMemory, MatrixMemoryConfig
from engrax.layers.common.modules import projection
from engrax.layers.mixer import MIXERS


@MIXERS.register("gsa")
@dataclasses.dataclass(frozen=True)
class GSAConfig(MatrixMemoryConfig):
    """Settings of gated slot attention."""

    slots: int = 32  # slots of a head's memory
    gate_temperature: float = 8.0  # divides the log of the forget gate; more = slower forgetting

    def __post_init__(self):
        super().__post_init__()
        self.at_least_one("slots")
        if self.gate_temperature <= 0:
            raise UserError(f"gate_temperature={self.gate_temperature} must be positive.")
        if self.values[0] != self.heads:
            raise UserError(
                f"value_heads={self.value_heads} must be heads={self.heads}: queries and values share slots."
            )

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "GSA":
        return GSA(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["GSAConfig", ...]:
        small = cls(heads=2, head_dim=4, value_dim=6, chunk_size=8, conv_width=4, output_gate=True, slots=5)
        return small, cls()

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        H, M = self.heads, self.slots
        return Matrix(H, H * M, self.head_dim, 1), Matrix(H, H, M, self.values[1])

    def gate_multiplies(self, dim: int) -> int:
        return dim * self.heads * self.slots


class GSA(MatrixMemory):
    """The module of GSAConfig."""

    norm_width = "all"

    def __init__(self, config: GSAConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.forget = projection(dim, config.heads * config.slots, ("embed", "heads"), rngs=rngs, wide=True)

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, v = (jax.nn.silu(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        logits = self.forget(x_BTD).astype(self.wide_dtype())
        g = jax.nn.log_sigmoid(logits) / self.config.gate_temperature
        return q, k, v, {"g": g.reshape(*x_BTD.shape[:2], self.config.heads, -1)}

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        B, T, H, _ = q.shape
        g_BTHM = terms["g"]
        write_BTHM = -jnp.expm1(g_BTHM).astype(v.dtype)
        slot_heads = (B, T, H * self.config.slots)
        per_slot = {"g": g_BTHM.reshape(slot_heads), "scale": 1.0}
        logits, keys = self.apply_once(q, k, write_BTHM.reshape(*slot_heads, 1), per_slot, state.memory[0], segment_ids)
        weights = jax.nn.softmax(logits.reshape(g_BTHM.shape).astype(g_BTHM.dtype), axis=-1).astype(v.dtype)
        out, values = self.apply_once(weights, write_BTHM, v, {"g": g_BTHM, "scale": 1.0}, state.memory[1], segment_ids)
        return jax.nn.silu(out), (keys, values)
