"""Natural GaLore (arXiv 2410.16029): GaLore whose projected gradients are preconditioned by the inverse Fisher matrix.

With g the projected gradient of a matrix as a vector, and H [s, K] its last s ones, g the newest, the Fisher matrix is
taken as damping I + H^T H, and Woodbury's identity gives its inverse's product with g,

    g / damping - H^T z / damping^2,   (I + H H^T / damping) z = H g.

Because g is the row j of H, this equals H^T y with (damping I + H H^T) y = e_j, which is computed: it has no
cancellation. Adam follows, as in GaLore. The history adds s rank max(in, out) numbers to GaLore's state: with s = 20
ten times its two moments.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from engrax.errors import UserError, require_at_least
from engrax.train.optimizers.base import OPTIMIZERS
from engrax.train.optimizers.galore import GaLoreConfig
from engrax.train.optimizers.matrices import map_arrays


@OPTIMIZERS.register("natural_galore")
@dataclasses.dataclass(frozen=True, kw_only=True)
class NaturalGaLoreConfig(GaLoreConfig):
    """GaLore on natural gradients."""

    history: int = 20  # projected gradients of which the Fisher matrix is made
    damping: float = 1e-3  # multiple of the identity in it

    def __post_init__(self):
        super().__post_init__()
        require_at_least("optimizer", self, history=1)
        if not self.damping > 0:
            raise UserError(f"optimizer.damping={self.damping} must be above 0: gradients are divided by it.")

    def in_subspace(self) -> optax.GradientTransformation:
        return optax.chain(self._natural(), self._adam())

    def _natural(self) -> optax.GradientTransformation:
        def init(params):
            def one(p):
                return jnp.zeros((*p.shape[:-2], self.history, p.shape[-2] * p.shape[-1]), jnp.float32)

            return NaturalState(jnp.zeros((), jnp.int32), jax.tree.map(one, params))

        def update(grads, state, params=None):
            newest = jnp.arange(self.history) == state.count % self.history

            def one(g, past):
                flat = g.reshape(*g.shape[:-2], 1, -1)
                past = jnp.where(newest[:, None], flat, past)
                fisher = past @ jnp.swapaxes(past, -1, -2) + self.damping * jnp.eye(self.history)
                e = jnp.broadcast_to(newest.astype(jnp.float32)[:, None], (*g.shape[:-2], self.history, 1))
                y = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(fisher), True), e)
                return (jnp.swapaxes(y, -1, -2) @ past).reshape(g.shape), past

            natural, past = map_arrays(one, 2, grads, state.past)
            return natural, NaturalState(state.count + 1, past)

        return optax.GradientTransformation(init, update)


class NaturalState(NamedTuple):
    """Steps done, and the last projected gradients [*stack, history, K] of every matrix."""

    count: Int[Array, ""]
    past: Any
