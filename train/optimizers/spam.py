"""SPAM (arXiv 2501.06842): Adam with clipping of spikes and momentum reset, for gradients up to 1000 times typical.

An entry with g^2 > threshold v becomes sign(g) sqrt(threshold v), v being the second moment before the step. Every
`gap` steps both moments restart at zero, and the step is scaled by 1 - 0.99 (1 + cos(pi s / (warmup + 1))) / 2 for s =
0, ..., warmup - 1 steps after that. In the first `settle` steps after a restart nothing is clipped, because v is still
too small. Bias correction counts all steps, as in the paper. The state is Adam's: 8 bytes per parameter.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from engrax.errors import UserError, require_at_least
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.optimizers.matrices import map_arrays


@OPTIMIZERS.register("spam")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SPAMConfig(OptimizerConfig):
    """SPAM: Adam whose moments forget spikes."""

    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.999  # decay of the gradient's square
    eps: float = 1e-6  # added to the root of the second moment
    threshold: float = 5000.0  # squared gradient over second moment above which an entry is clipped
    gap: int = 500  # steps between resets of the moments
    warmup: int = 150  # steps of the rise to the whole step after a reset
    settle: int = 20  # steps after a reset without clipping

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("b1", "b2")
        require_at_least("optimizer", self, eps=0, threshold=0, gap=2, warmup=0, settle=1)
        if self.warmup >= self.gap or self.settle >= self.gap:
            raise UserError(
                f"optimizer.warmup={self.warmup} and optimizer.settle={self.settle} must be below "
                f"optimizer.gap={self.gap}, the steps between resets."
            )

    def direction(self) -> optax.GradientTransformation:
        def init(params):
            mu, nu = (jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params) for _ in range(2))
            return SPAMState(jnp.zeros((), jnp.int32), mu, nu)

        def update(grads, state, params=None):
            step = state.count + 1
            since = step % self.gap  # steps since the last reset
            clips, resets = since >= self.settle, since == 0
            rises = (step >= self.gap) & (since < self.warmup)
            scale = jnp.where(rises, 1 - 0.495 * (1 + jnp.cos(jnp.pi * since / (self.warmup + 1))), 1.0)
            unbias = [1 - b ** step.astype(jnp.float32) for b in (self.b1, self.b2)]

            def one(g, m, v):
                m, v = (jnp.where(resets, 0.0, x) for x in (m, v))
                spike = clips & (g * g > self.threshold * v)
                g = jnp.where(spike, jnp.sign(g) * jnp.sqrt(self.threshold * v), g)
                m = self.b1 * m + (1 - self.b1) * g
                v = self.b2 * v + (1 - self.b2) * g * g
                return scale * (m / unbias[0]) / (jnp.sqrt(v / unbias[1]) + self.eps), m, v

            direction, mu, nu = map_arrays(one, 3, grads, state.mu, state.nu)
            return direction, SPAMState(step, mu, nu)

        return optax.GradientTransformation(init, update)


class SPAMState(NamedTuple):
    """Steps done, and Adam's moments."""

    count: Int[Array, ""]
    mu: Any
    nu: Any
