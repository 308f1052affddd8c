"""Adafactor (arXiv 1804.04235): the second moment of a matrix as the product of its row and column means.

V = r c^T / mean(r), with r and c running means of the squared gradient over columns and rows, decay 1 - t^-decay. The
direction G / sqrt(V) is divided by max(1, its root mean square / threshold) and multiplied by max(least_scale, root
mean square of the parameter): the learning rate is relative. Both root mean squares are a layer's.

The second moment is optax's: an array with two axes of at least `least_factored` is factored along the two largest,
into in + out numbers per layer; others have one number per entry. No momentum.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from engrax.errors import UserError, require_at_least
from engrax.models.parameters import LAYERS, axes_of
from engrax.train.optimizers.base import OPTIMIZERS, OptimizerConfig, map_variables


@OPTIMIZERS.register("adafactor")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AdafactorConfig(OptimizerConfig):
    """Adafactor: a factored second moment, and steps relative to the parameters' size."""

    elementwise = False

    learning_rate: float = 1e-2  # peak of the schedule, relative to a parameter's root mean square
    decay: float = 0.8  # the second moment's decay at step t is 1 - t^-decay
    eps: float = 1e-30  # added to the squared gradient
    threshold: float = 1.0  # largest root mean square of a direction, before it is scaled by the parameter's
    least_scale: float = 1e-3  # least root mean square of a parameter in the step's size
    least_factored: int = 128  # least length of both axes of a factored array

    def __post_init__(self):
        super().__post_init__()
        require_at_least("optimizer", self, eps=0, least_scale=0, least_factored=1)
        for name in ("decay", "threshold"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be above 0.")

    def direction(self) -> optax.GradientTransformation:
        factored = optax.scale_by_factored_rms(
            decay_rate=self.decay, epsilon=self.eps, min_dim_size_to_factor=self.least_factored
        )

        def clip(updates, _):
            return map_variables(lambda u: _by(u, lambda size: 1 / jnp.maximum(1.0, size / self.threshold)), updates)

        def relative(updates, params):
            return map_variables(
                lambda u, p: _by(u, lambda size: jnp.maximum(size, self.least_scale), p), updates, params
            )

        return optax.chain(_without_placeholders(factored), optax.stateless(clip), optax.stateless(relative))


def _by(update: Any, factor: Callable[[Float[Array, "..."]], Float[Array, "..."]], of: Any = None) -> Any:
    """The update times factor(root mean square of `of`, by default of itself), in every layer of a stack."""
    if not jax.tree.leaves(update):  # a frozen parameter
        return update
    value = (update if of is None else of).get_value()
    axes = tuple(range(axes_of(update)[:1] == (LAYERS,), value.ndim))
    size = jnp.sqrt(jnp.mean(value * value, axis=axes, keepdims=True))
    return update.replace(update.get_value() * factor(size))


def _without_placeholders(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """optax's factored second moment without its placeholders of one number, which are never read."""

    def emptied(state, params):
        def one(p, row, column, full):
            empty = jnp.zeros((0,), jnp.float32)
            return (empty, empty, full) if full.shape == p.shape else (row, column, empty)

        leaves, structure = jax.tree.flatten(params)
        parts = [jax.tree.leaves(part) for part in (state.v_row, state.v_col, state.v)]
        found = [one(*arrays) for arrays in zip(leaves, *parts, strict=True)]
        rows, columns, full = (structure.unflatten([f[i] for f in found]) for i in range(3))
        return state._replace(v_row=rows, v_col=columns, v=full)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, state, params)
        return updates, emptied(state, params)

    return optax.GradientTransformation(lambda params: emptied(tx.init(params), params), update)
