"""FRUGAL (arXiv 2411.07837): AdamW on a part of every matrix's gradient, signSGD on the rest.

For `gap` steps, round down `density` in rows of a matrix [in, out], the weights of randomly drawn inputs (the paper's
columns), are Adam's, whose moments and bias correction start again at every draw. The other rows take free_rate
sign(g). The rows follow from the number of the step and `seed`, so that no index is stored: the state of a matrix has
2 density in out numbers. Parameters that are no matrices are Adam's.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from engrax.errors import UserError, require_at_least
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig
from engrax.train.optimizers.matrices import for_matrices, map_arrays


@OPTIMIZERS.register("frugal")
@dataclasses.dataclass(frozen=True, kw_only=True)
class FRUGALConfig(OptimizerConfig):
    """FRUGAL: moments for a changing part of every matrix, the sign of the gradient for the rest."""

    elementwise = False

    learning_rate: float = 1e-3  # peak of the schedule
    density: float = 0.25  # part of a matrix's rows with moments
    gap: int = 200  # steps between two draws of these rows
    free_rate: float = 1.0  # factor of the sign of the gradient in the other rows
    seed: int = 0  # of the draws
    b1: float = 0.9  # decay of the gradient's mean
    b2: float = 0.999  # decay of the gradient's square
    eps: float = 1e-8  # added to the root of the second moment

    def __post_init__(self):
        super().__post_init__()
        self.check_unit_interval("b1", "b2")
        require_at_least("optimizer", self, gap=1, free_rate=0, eps=0)
        if not 0 < self.density <= 1:
            raise UserError(f"optimizer.density={self.density} must be above 0 and at most 1.")

    def direction(self) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(b1=self.b1, b2=self.b2, eps=self.eps, mu_dtype=jnp.float32)
        return for_matrices(self._split(), adam, lambda shape: self._rows(shape) > 0)

    def _rows(self, shape: tuple[int, ...]) -> int:
        return int(shape[-2] * self.density)

    def _split(self) -> optax.GradientTransformation:
        def init(params):
            def one(p):
                return jnp.zeros((*p.shape[:-2], self._rows(p.shape), p.shape[-1]), jnp.float32)

            return FRUGALState(jnp.zeros((), jnp.int32), *(jax.tree.map(one, params) for _ in range(2)))

        def update(grads, state, params=None):
            draw, since = state.count // self.gap, state.count % self.gap
            key = jax.random.fold_in(jax.random.key(self.seed), draw)
            step = (since + 1).astype(jnp.float32)
            shapes = [g.shape for g in jax.tree.leaves(grads)]
            rows = [drawn_rows(jax.random.fold_in(key, i), s, self._rows(s)) for i, s in enumerate(shapes)]

            def one(g, m, v, rows):
                m, v = (jnp.where(since == 0, 0.0, x) for x in (m, v))
                part = _taken(g, rows)
                m = self.b1 * m + (1 - self.b1) * part
                v = self.b2 * v + (1 - self.b2) * part * part
                adam = m / (1 - self.b1**step) / (jnp.sqrt(v / (1 - self.b2**step)) + self.eps)
                free = self.free_rate * jnp.sign(g)
                return _put(free, rows, adam), m, v

            rows = jax.tree.unflatten(jax.tree.structure(grads), rows)
            direction, mu, nu = map_arrays(one, 3, grads, state.mu, state.nu, rows)
            return direction, FRUGALState(state.count + 1, mu, nu)

        return optax.GradientTransformation(init, update)


class FRUGALState(NamedTuple):
    """Steps done, and the moments [*stack, density in, out] of every matrix."""

    count: Int[Array, ""]
    mu: Any
    nu: Any


_taken = jnp.vectorize(lambda matrix, rows: matrix[rows], signature="(i,o),(n)->(n,o)")
_put = jnp.vectorize(lambda matrix, rows, new: matrix.at[rows].set(new), signature="(i,o),(n),(n,o)->(i,o)")


def drawn_rows(key: Array, shape: tuple[int, ...], count: int) -> Int[Array, "*stack N"]:
    """`count` different rows of every matrix of a stack."""
    stack = shape[:-2]
    keys = jax.random.split(key, math.prod(stack))
    drawn = jax.vmap(lambda key: jax.random.permutation(key, shape[-2])[:count])(keys)
    return drawn.reshape(*stack, count)
