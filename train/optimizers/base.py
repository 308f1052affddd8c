"""The optimizer contract, the registry of optimizers, and the code that all optimizers share.

An optimizer is one file, here or in a user's folder: a frozen dataclass under `@engrax.register("name")` that returns
the direction of a step. Schedule, decoupled weight decay and frozen parameters are the same for all. Clipping and
accumulation of microbatches are part of the training step, which knows the global norm.
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
from engrax.models.parameters import decay_mask
from engrax.registry import Registry
from engrax.train.schedules import CosineConfig, ScheduleConfig

OPTIMIZERS = Registry("optimizer", "engrax.train.optimizers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    """Base of every optimizer's settings, with the fields that all share."""

    registry: ClassVar[Registry] = OPTIMIZERS
    registered_name: ClassVar[str] = ""

    learning_rate: float = 3e-3  # peak of the schedule
    schedule: ScheduleConfig = CosineConfig()  # learning rate by step, as a fraction of the peak
    weight_decay: float = 0.1  # per step, times the learning rate; on matrices (`decay_mask`), never on the gradient
    clip_norm: float = 1.0  # largest global gradient norm; 0 = no clipping
    accumulate: int = 1  # microbatches per step

    def __post_init__(self):
        require_at_least("optimizer", self, accumulate=1, learning_rate=0, weight_decay=0, clip_norm=0)

    @abc.abstractmethod
    def direction(self) -> optax.GradientTransformation:
        """Maps gradients to the direction of a step, which is then decayed and scaled by minus the learning rate.

        Its state may hold arrays of the parameters' shapes (moments); ZeRO shards them like the parameters.
        """

    def rate(self, steps: int) -> optax.Schedule:
        """The learning rate by step for a training of `steps` steps."""
        return self.schedule.rate(self.learning_rate, steps)

    def check_unit_interval(self, *names: str) -> None:
        """Raises UserError for the first named field outside [0, 1)."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optimizer.{name}={getattr(self, name)} must be at least 0 and below 1.")


def build(config: OptimizerConfig, steps: int, params: nnx.State) -> optax.GradientTransformation:
    """The optimizer for a training of `steps` steps: x -= rate (direction + weight_decay x), decay where `decay_mask`.

    Frozen parameters have no state. `params` may be abstract; only the masks are read from them.
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


def stop_frozen(params: Any) -> Any:
    """The parameters, with the gradient of frozen ones stopped."""
    return _map_variables(lambda v: v.replace(jax.lax.stop_gradient(v.get_value())) if is_frozen(v) else v, params)


def keep_frozen(old: Any, new: Any) -> Any:
    """`new` with the frozen parameters of `old`: adding an update of 0 would change the sign of -0."""
    return _map_variables(lambda v, after: v if is_frozen(v) else after, old, new)


def _map_variables(f: Callable, *trees: Any) -> Any:
    return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable))
