"""Mamba-2's block, the state-space dual form (arXiv 2405.21060):

    [C, B, u]_t = silu(conv(x W_in)_t),  dt_t = softplus(x_t W_dt + b),  a_t = exp(-exp(A) dt_t)
    S_t = a_t S_{t-1} + B_t (dt_t u_t)^T,  o_t = C_t S_t + D u_t,  y_t = W_o norm(o_t * silu(x_t W_z))

In the words of linear attention C are queries, B keys, dt u values; a head has one decay and a group of heads shares B
and C. The norm comes after the gate and goes over all heads.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.layers.common.gates import DecayGate
from engrax.layers.common.matrix_memory import MatrixMemory, MatrixMemoryConfig
from engrax.layers.mixer import MIXERS


@MIXERS.register("mamba2")
@dataclasses.dataclass(frozen=True)
class Mamba2Config(MatrixMemoryConfig):
    """Settings of Mamba-2: heads are its groups, value_heads its heads, head_dim its state size."""

    heads: int = 1  # groups, each with its own B and C
    value_heads: int | None = 4  # heads, a multiple of the groups; None = heads
    conv_width: int = 4  # taps of the short convolution on C, B and u; 1 = none
    output_gate: bool = True  # whether the read is gated by a projection of the input

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Mamba2":
        return Mamba2(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["Mamba2Config", ...]:
        return cls(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8), cls()

    def gate_multiplies(self, dim: int) -> int:
        return dim * self.values[0]


class Mamba2(MatrixMemory):
    """The module of Mamba2Config."""

    norm_width = "all"

    def __init__(self, config: Mamba2Config, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, num_layers=num_layers)
        self.decay = DecayGate(dim, config.values[0], rngs=rngs)
        self.skip = nnx.Param(jnp.ones(config.values[0]), axes=("heads",), role="gate")

    def tokens(self, x_BTD, q_BTHK, k_BTHK, v_BTHV, place_BT):
        q, k, u = (jax.nn.silu(y) for y in (q_BTHK, k_BTHK, v_BTHV))
        g_BTH1, step_BTH1 = self.decay(x_BTD, self.wide_dtype())
        return q, k, (step_BTH1 * u).astype(u.dtype), {"g": g_BTH1[..., 0], "scale": 1.0, "unscaled": u}

    def apply_operation(self, q, k, v, terms, state, segment_ids):
        terms = dict(terms)
        u = terms.pop("unscaled")
        out, memory = super().apply_operation(q, k, v, terms, state, segment_ids)
        return out + self.skip[...][:, None] * u, memory

    def project_read(self, x_BTD, read_BTHV):
        y = read_BTHV.reshape(*read_BTHV.shape[:2], -1)
        if self.config.output_gate:
            y = y * jax.nn.silu(self.gate(x_BTD))
        return self.out(self.norm(y))
