"""The optimizer contract, the registry of optimizers, and the code that all optimizers share.

An optimizer is one file, here or in a user's folder: a frozen dataclass under `@engrax.register("name")` that returns
the direction of a step. Schedule, decoupled weight decay, rates per group, 8-bit moments and frozen parameters are the
same for all. Clipping and accumulation of microbatches are part of the training step, which knows the global norm.
"""

import abc
import dataclasses
import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Literal

import jax
import optax
from flax import nnx

from engrax.errors import UserError, require_at_least
from engrax.layers.common.lora import is_frozen
from engrax.models.parameters import ROLES, decay_mask, role_of
from engrax.registry import Registry
from engrax.train.optimizers.eight_bit import with_eight_bit_moments
from engrax.train.schedules import CosineConfig, ScheduleConfig

OPTIMIZERS = Registry("optimizer", "engrax.train.optimizers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(abc.ABC):
    """Base of every optimizer's settings, with the fields that all share."""

    registry: ClassVar[Registry] = OPTIMIZERS
    registered_name: ClassVar[str] = ""
    elementwise: ClassVar[bool] = True  # a slice of a parameter is updated from slices of its gradient and state alone
    averages: ClassVar[bool] = False  # the parameters to evaluate are not those that gradients are taken at

    learning_rate: float = 3e-3  # peak of the schedule
    schedule: ScheduleConfig = CosineConfig()  # learning rate by step, as a fraction of the peak
    weight_decay: float = 0.1  # per step, times the learning rate; on matrices (`decay_mask`), never on the gradient
    clip_norm: float = 1.0  # largest global gradient norm; 0 = no clipping
    accumulate: int = 1  # microbatches per step
    rates: tuple[tuple[str, float], ...] = ()  # (pattern of parameter names, factor of their rate); the first that fits
    frozen: tuple[str, ...] = ()  # patterns of names, or roles, of parameters that the training does not change
    moments: Literal["float32", "float8"] = "float32"  # how moments are kept between steps (float8: `eight_bit`)

    def __post_init__(self):
        require_at_least("optimizer", self, accumulate=1, learning_rate=0, weight_decay=0, clip_norm=0)
        for pattern, factor in self.rates:
            if factor < 0:
                raise UserError(f"optimizer.rates gives {pattern!r} the factor {factor}; it must be at least 0.")

    @abc.abstractmethod
    def direction(self) -> optax.GradientTransformation:
        """Maps gradients to the direction of a step, which is then decayed and scaled by minus the learning rate.

        Its state may hold arrays for parameters. They lie in the parameters' variables, as `jax.tree.map` over the
        parameters leaves them, with the stacked layers' axis first where the parameter has one; ZeRO shards them.
        """

    def transformation(self, steps: int, decayed: Any, factors: Any) -> optax.GradientTransformation:
        """The update of a training of `steps` steps: -rate factor (direction + weight_decay x where `decayed`)."""
        direction = self.direction() if self.moments == "float32" else with_eight_bit_moments(self.direction())
        return optax.chain(
            direction,
            optax.add_decayed_weights(self.weight_decay, decayed),
            optax.scale_by_learning_rate(self.rate(steps)),
            _scaled(factors),
        )

    def evaluated(self, params: Any, opt_state: Any) -> Any:
        """The parameters to evaluate, generate with and export; others than `params` if the class says `averages`."""
        return params

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

    Frozen parameters have no state. `params` may be abstract; only names and roles are read from them. Raises UserError
    for a pattern in `rates` or `frozen` that fits no parameter.
    """
    still = {path for path, _ in _fitting(config, nnx.to_flat_state(params))}

    def label(path, variable):
        name = tuple(entry.key for entry in path if hasattr(entry, "key"))
        return variable.replace("frozen" if is_frozen(variable) or name in still else "trained")

    labels = jax.tree_util.tree_map_with_path(label, params, is_leaf=is_variable)
    trained = config.transformation(steps, decay_mask(params), rate_factors(config, params))
    if "frozen" not in jax.tree.leaves(labels):
        return trained
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def freeze(config: OptimizerConfig, model: nnx.Module) -> nnx.Module:
    """The model, with the parameters marked that `config.frozen` names."""
    found = ((path, value) for path, value in nnx.iter_graph(model) if isinstance(value, nnx.Param))
    for _, variable in _fitting(config, found):
        variable.set_metadata(frozen=True)
    return model


def _fitting(config: OptimizerConfig, params: Iterable[tuple[tuple, nnx.Variable]]) -> list[tuple[tuple, nnx.Variable]]:
    """Those parameters that `config.frozen` names. Raises UserError for a pattern that fits none."""
    unused, found, name = set(config.frozen), [], ""
    for path, variable in params if config.frozen else ():
        name, role = ".".join(map(str, path)), variable.get_metadata().get("role")
        fits = {pattern for pattern in config.frozen if pattern == role or fnmatch.fnmatchcase(name, pattern)}
        unused -= fits
        found += [(path, variable)] if fits else []
    if unused:
        raise UserError(
            f"optimizer.frozen has {min(unused)!r}, which is no role ({', '.join(ROLES)}) and fits no parameter; names "
            f"are like {name!r}."
        )
    return found


def rate_factors(config: OptimizerConfig, params: nnx.State) -> Any:
    """The factor of the learning rate for every parameter: its role's, times that of the first pattern that fits."""
    unused, names = {pattern for pattern, _ in config.rates}, []

    def one(path, variable):
        names.append(jax.tree_util.keystr(path, simple=True, separator="."))
        fits = [(p, factor) for p, factor in config.rates if fnmatch.fnmatchcase(names[-1], p)]
        unused.difference_update(p for p, _ in fits)
        return variable.replace(role_of(variable).learning_rate * (fits[0][1] if fits else 1.0))

    factors = jax.tree_util.tree_map_with_path(one, params, is_leaf=is_variable)
    if unused:
        raise UserError(
            f"optimizer.rates has the pattern {min(unused)!r}, which fits no parameter; names are like {names[0]!r}."
        )
    return factors


def _scaled(factors: Any) -> optax.GradientTransformation:
    """Multiplies every update by its factor; masked parameters have no update."""

    def scale(updates, _):
        return jax.tree.map(lambda f, u: u * f if f != 1 and isinstance(u, jax.Array) else u, factors, updates)

    return optax.stateless(scale)


def stop_frozen(params: Any) -> Any:
    """The parameters, with the gradient of frozen ones stopped."""
    return map_variables(lambda v: v.replace(jax.lax.stop_gradient(v.get_value())) if is_frozen(v) else v, params)


def keep_frozen(old: Any, new: Any) -> Any:
    """`new` with the frozen parameters of `old`: adding an update of 0 would change the sign of -0."""
    return map_variables(lambda v, after: v if is_frozen(v) else after, old, new)


def is_variable(x: Any) -> bool:
    """Whether x is a parameter with its metadata, not an array."""
    return isinstance(x, nnx.Variable)


def map_variables(f: Callable, *trees: Any) -> Any:
    """f(variable, ...) over trees of parameters."""
    return jax.tree.map(f, *trees, is_leaf=is_variable)
