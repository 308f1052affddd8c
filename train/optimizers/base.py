"""The optimizer contract, the registry that finds an optimizer by name, and what every optimizer shares.

An optimizer is one file here, or the user's own: a frozen dataclass under `@engrax.register("name")` that says which
direction it takes. The schedule, decoupled weight decay and frozen parameters are the same for all. Clipping and the
accumulation of microbatches lie in the training step, where the global norm is known.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax
from flax import nnx

from engrax.errors import UserError, require_at_least
from engrax.layers.common.lora import is_frozen
from engrax.registry import Registry
from engrax.train.schedules import CosineConfig, ScheduleConfig

OPTIMIZERS = Registry("optimizer", "engrax.train.optimizers")

DECAYED_AXES = {"embed", "mlp", "heads", "vocab"}  # a matrix between two of these is decayed; nothing else is


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    """Base of every optimizer's settings, and the part of them that all share."""

    registry: ClassVar[Registry] = OPTIMIZERS
    registered_name: ClassVar[str] = ""

    learning_rate: float = 3e-3  # peak of the schedule
    schedule: ScheduleConfig = CosineConfig()  # learning rate by step, as a part of the peak
    weight_decay: float = 0.1  # per step, times the learning rate; on matrices (`decay_mask`), never on the gradient
    clip_norm: float = 1.0  # largest global gradient norm; 0 = no clipping
    accumulate: int = 1  # microbatches per step

    def __post_init__(self):
        require_at_least("optimizer", self, accumulate=1, learning_rate=0, weight_decay=0, clip_norm=0)

    @abc.abstractmethod
    def direction(self) -> optax.GradientTransformation:
        """From gradients to the direction of a step: what is scaled by -learning rate after weight decay is added.

        Its state may hold arrays of the parameters' shapes (moments); ZeRO shards these as it shards the parameters.
        """

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step of a training of `steps` steps."""
        return self.schedule.rate(self.learning_rate, steps)

    def check_unit_interval(self, *names: str) -> None:
        """Raises UserError for the first named field outside [0, 1)."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1.")


def build(config: OptimizerConfig, steps: int, params: nnx.State) -> optax.GradientTransformation:
    """The optimizer of a training of `steps` steps: x -= rate (direction + weight_decay x), decay where `decay_mask`.

    Frozen parameters have no state. `params` give the masks; abstract ones serve.
    """
    labels = _map_variables(lambda v: v.replace("frozen" if is_frozen(v) else "trained"), params)
    trained = optax.chain(
        config.direction(),
        optax.add_decayed_weights(config.weight_decay, decay_mask(params)),
        optax.scale_by_learning_rate(config.rate(steps)),
    )
    if "frozen" not in jax.tree.leaves(labels):
        return trained
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def decay_mask(params: nnx.State) -> nnx.State:
    """True on the matrices that weight decay pulls to zero, by their logical axes: projections and embeddings."""

    def decays(variable: nnx.Variable) -> nnx.Variable:
        axes = variable.get_metadata().get("axes", ())
        return variable.replace(len(axes) >= 2 and set(axes) <= DECAYED_AXES)

    return jax.tree.map(decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def stop_frozen(params: Any) -> Any:
    """The parameters, those marked as frozen without a gradient."""
    return _map_variables(lambda v: v.replace(jax.lax.stop_gradient(v.get_value())) if is_frozen(v) else v, params)


def keep_frozen(old: Any, new: Any) -> Any:
    """`new`, the parameters marked as frozen as they were: adding an update of 0 would change the sign of -0."""
    return _map_variables(lambda v, after: v if is_frozen(v) else after, old, new)


def _map_variables(f: Callable, *trees: Any) -> Any:
    return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable))
