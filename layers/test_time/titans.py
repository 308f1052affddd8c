"""Titans neural memory as a token mixer (arXiv 2501.00663, sections 3 and 4.4).

Keys, values and queries are projected, convolved, passed through SiLU and l2-normalised. Gates per token and head
control the memory. Its read is normalised, gated and projected:

    eta_t = sigmoid(x_t w_eta),  alpha_t = sigmoid(x_t w_alpha),  theta_t = max_lr sigmoid(x_t w_theta) (1 - eta_t)
    S_t = eta_t S_{t-1} - theta_t grad 1/2 ||M(k_t) - v_t||^2        (eq. 14; the gradient at the chunk's anchor)
    M_t = (1 - alpha_t) M_{t-1} + S_t                                (eq. 13)
    y_t = W_o (norm(M_t(q_t)) * silu(x_t W_g))                       (eq. 15)

The paper does not give a range for theta. A key repeated in a chunk of b tokens is written b times against one anchor,
and momentum multiplies each write by 1 / (1 - eta). If b theta / (1 - eta) times the curvature of the inner loss
exceeds about 2, the inner gradient descent diverges. Therefore theta has the factor (1 - eta_t), max_lr is 1 / 2b by
default, and values have unit length: long values cause large weights, and large weights a large curvature (without it a
byte-level run diverged at step 41). The norm of the read makes its length irrelevant. Each layer between two hidden
layers adds to the curvature, so it halves the default; docs/titans.md has the measurements.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from engrax.errors import UserError
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.test_time.base import ShellState
from engrax.layers.test_time.mixer import MemoryConfig, TestTimeMemory
from engrax.layers.test_time.rule import Matrices
from engrax.pallas_kernels import NeuralMemoryState


@MIXERS.register("titans")
@dataclasses.dataclass(frozen=True)
class TitansConfig(MixerConfig):
    """Settings of the Titans neural memory; `general` has the same memory as settings of `test_time_memory`."""

    heads: int = 4  # independent memories
    head_dim: int = 32  # key and value width of a head
    hidden: int = 64  # width of the memory MLP's inner layers, per head
    depth: int = 2  # layers of the memory MLP, 1 (a matrix) to 4
    chunk_size: int = 16  # tokens whose gradients are taken at one anchor
    conv_width: int = 4  # taps of the short convolution; 1 = none
    output_gate: bool = True  # whether the read is gated by a projection of the input
    persistent_tokens: int = 0  # learned tokens written into the memory before every segment
    max_lr: float | None = None  # upper bound of theta / (1 - eta), per token; None: see `lr_bound`
    lr_init: float = 0.5  # theta at the start, as a fraction of that bound
    forget_init: float = 0.001  # alpha at the start, per token, of the middle head
    momentum: bool = True  # False: eta = 0
    forgetting: bool = True  # False: alpha = 0
    activation: str = "gelu"  # activation of the memory MLP
    save_every: int = 1  # chunks between saved states in the backward pass; more = less memory, more recomputation
    implementation: str | None = None  # of the operation neural_memory: reference | xla | ...; None = by platform

    def __post_init__(self):
        if not 1 <= self.depth <= 4:
            raise UserError(f"depth={self.depth} of the memory MLP must be 1 to 4.")
        _ = self.general  # refuses what it cannot mean

    def of_heads(self, shares: int) -> "TitansConfig":
        return self.with_heads_cut(shares, ("heads",))

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Titans":
        return Titans(self.general, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["TitansConfig", ...]:
        small = cls(heads=2, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3)
        return (
            small,
            dataclasses.replace(small, depth=1, persistent_tokens=0, conv_width=1, output_gate=False),
            dataclasses.replace(small, depth=4, momentum=False, forgetting=False, chunk_size=4),
            cls(),
        )

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Widths between the memory's layers: (head_dim, hidden, ..., head_dim)."""
        return (self.head_dim, *[self.hidden] * (self.depth - 1), self.head_dim)

    @property
    def lr_bound(self) -> float:
        """Upper bound of theta / (1 - eta): `max_lr`, or a default without overshoot for a key that fills its chunk."""
        return self.general.lr_bound

    @property
    def general(self) -> MemoryConfig:
        """The settings of `test_time_memory` that are this memory."""
        same = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        own = dict(
            optimizer="momentum" if same.pop("momentum") else "sgd",
            forgetting="token" if same.pop("forgetting") else "none",
        )
        return MemoryConfig(**same, **own)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        return self.general.flops_per_token(dim, seq_len)


class Titans(TestTimeMemory):
    """The module of TitansConfig: x [B, T, D] -> y [B, T, D], ShellState with a NeuralMemoryState.

    Its matrices are a list, each drawn with a key of its own, as runs have them saved.
    """

    def _add_matrices(self, rngs: nnx.Rngs, last_scale: float) -> None:
        shapes = list(self.config.rule().structure.widths().values())
        scales = [2**0.5] * (len(shapes) - 1) + [last_scale]
        self.initial = nnx.List(
            nnx.Param(
                s * jax.random.normal(rngs.params(), (self.config.heads, i, o)) * i**-0.5,
                axes=("heads", "memory_in", "memory_out"),
                role="initial memory",
            )
            for s, (i, o) in zip(scales, shapes)
        )

    def _learned_matrices(self) -> Matrices:
        return {name: w[...] for name, w in zip(self.config.rule().structure.widths(), self.initial)}

    def report(
        self, x_BTD: Float[Array, "B T D"], state: ShellState | None = None, segment_ids=None
    ) -> dict[str, Array]:
        """Diagnostics of one call: those of `TestTimeMemory`, and the surprise of the memory before and after it."""
        before = self.init_state(len(x_BTD)) if state is None else state
        _, after, (_, k, v, gates) = self._mix(x_BTD, state, segment_ids)
        no_write = jax.tree.map(jnp.zeros_like, gates)

        def surprise(memory: NeuralMemoryState):
            nothing = jax.tree.map(jnp.zeros_like, memory.momentum)
            held = NeuralMemoryState(memory.weights, nothing, memory.weights, np.zeros(len(x_BTD), np.int32))
            predicted, _ = self._memory(k, k, v, no_write, held, None, None)
            return 0.5 * jnp.mean(jnp.sum((predicted - v) ** 2, axis=-1).astype(jnp.float32))

        found = {"momentum_mean": jnp.zeros(())} | super().report(x_BTD, state, segment_ids)
        return found | {"surprise_before": surprise(before.memory), "surprise_after": surprise(after.memory)}
