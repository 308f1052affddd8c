"""Muon (K. Jordan, 2024; at scale arXiv 2502.16982): the momentum of a matrix, replaced by about its orthogonal factor.

M <- momentum M + (1 - momentum) G, with Nesterov's look ahead and bias correction; five Newton-Schulz steps map the
singular values of M / |M| to about 1; the step is rms sqrt(max(in, out)) times the result. With rms = 0.2 its entries
are as large as AdamW's, so that one learning rate and one weight decay serve both. Every layer of a stack, every
memory of a mixture, and queries, keys and values that lie in one kernel are matrices of their own. Embeddings, gates,
norms, biases, convolutions and initial memories are AdamW's.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from engrax.errors import require_at_least
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.optimizers.matrices import for_matrices, side_by_side


@OPTIMIZERS.register("muon")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon on matrices, with one moment; AdamW on all other parameters."""

    elementwise = False

    momentum: float = 0.95  # decay of a matrix's momentum
    newton_schulz_steps: int = 5  # steps of the quintic iteration
    rms: float = 0.2  # root mean square of a matrix's step, before the learning rate
    b1: float = 0.9  # AdamW's, for the other parameters
    b2: float = 0.95  # likewise
    eps: float = 1e-8  # likewise

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("momentum", "b1", "b2")
        require_at_least("optimizer", self, newton_schulz_steps=1, rms=0, eps=0)

    def direction(self) -> optax.GradientTransformation:
        def scaled(updates, _):
            return jax.tree.map(lambda u: u * self.rms * math.sqrt(max(u.shape[-2:])), updates)

        muon = scale_by_muon(
            beta=self.momentum,
            ns_steps=self.newton_schulz_steps,
            mu_dtype=jnp.float32,
            weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: MuonDimensionNumbers(-2, -1), tree),
        )
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps, mu_dtype=jnp.float32)
        return for_matrices(side_by_side(optax.chain(muon, optax.stateless(scaled))), adam)
