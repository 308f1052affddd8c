"""GaLore (arXiv 2403.03507): Adam on gradients of matrices, projected to the leading singular vectors.

For G [in, out] the shorter side is projected: R = P^T G, with P [in, rank] the left singular vectors of G if in <=
out, else R = G P with the right ones. P is computed again every `gap` steps; the moments are kept. The direction is
scale P Adam(R). Every layer of a stack has its own P. A matrix whose shorter side is at most `rank`, and all
parameters that are no matrices, are Adam's.

The state of a matrix has rank min(in, out) + 2 rank max(in, out) numbers. optax's GaLore is not used: it projects the
longer side, and it leaves stacked layers to Adam.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from engrax.errors import require_at_least
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.optimizers.matrices import for_matrices

Matrix = Float[Array, "*stack I O"]


@OPTIMIZERS.register("galore")
@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLoreConfig(OptimizerConfig):
    """GaLore: Adam in a subspace of every matrix's gradient."""

    elementwise = False

    learning_rate: float = 1e-2  # peak of the schedule
    rank: int = 128  # dimensions of the subspace
    gap: int = 200  # steps between two singular value decompositions
    scale: float = 0.25  # factor of a projected matrix's step
    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.999  # decay of the gradient's square
    eps: float = 1e-6  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("b1", "b2")
        require_at_least("optimizer", self, rank=1, gap=1, scale=0, eps=0)

    def direction(self) -> optax.GradientTransformation:
        projected = _in_subspace(self.in_subspace(), self.rank, self.gap, self.scale)
        return for_matrices(projected, self._adam(), lambda shape: min(shape[-2:]) > self.rank)

    def in_subspace(self) -> optax.GradientTransformation:
        """The rule for the projected gradients."""
        return self._adam()

    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps, mu_dtype=jnp.float32)


class GaLoreState(NamedTuple):
    """Steps done, P [*stack, min(in, out), rank] of every matrix, and the state of the rule for projected gradients."""

    count: Int[Array, ""]
    projector: Any
    inner: Any


def _in_subspace(
    inner: optax.GradientTransformation, rank: int, gap: int, scale: float
) -> optax.GradientTransformation:
    def init(params):
        projector = jax.tree.map(lambda p: jnp.zeros((*p.shape[:-2], min(p.shape[-2:]), rank), jnp.float32), params)
        return GaLoreState(jnp.zeros((), jnp.int32), projector, inner.init(jax.tree.map(project, params, projector)))

    def update(grads, state, params=None):
        projector = jax.lax.cond(
            state.count % gap == 0,
            lambda: jax.tree.map(lambda g: subspace(g, rank), grads),
            lambda: state.projector,
        )
        low, after = inner.update(jax.tree.map(project, grads, projector), state.inner)
        direction = jax.tree.map(lambda g, r, p: scale * _back(r, p, g.shape), grads, low, projector)
        return direction, GaLoreState(state.count + 1, projector, after)

    return optax.GradientTransformation(init, update)


def subspace(gradient: Matrix, rank: int) -> Float[Array, "*stack S R"]:
    """The first `rank` singular vectors of the shorter side."""
    left, _, right = jnp.linalg.svd(gradient.astype(jnp.float32), full_matrices=False)
    return left[..., :rank] if _wide(gradient.shape) else jnp.swapaxes(right, -1, -2)[..., :rank]


def project(gradient: Matrix, projector: Float[Array, "*stack S R"]) -> Float[Array, "..."]:
    """R: [*stack, rank, out] of a wide matrix, [*stack, in, rank] of a tall one."""
    return jnp.swapaxes(projector, -1, -2) @ gradient if _wide(gradient.shape) else gradient @ projector


def _back(low: Float[Array, "..."], projector: Float[Array, "*stack S R"], shape: tuple[int, ...]) -> Matrix:
    return projector @ low if _wide(shape) else low @ jnp.swapaxes(projector, -1, -2)


def _wide(shape: tuple[int, ...]) -> bool:
    return shape[-2] <= shape[-1]
