"""AdamW and its learning-rate schedules, from optax. Clipping lives in the step, where the global norm is known."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from engrax.layers.common.lora import is_frozen
from engrax.models.parameters import decay_mask
from engrax.train.experiment import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup from 0, then cosine | stable and linear decay (wsd) | constant.

    A pure function of the step, so that a resumed run continues it exactly.
    """
    peak, last = config.learning_rate, config.learning_rate * config.final_fraction
    warmup = min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "wsd":
        begin = decay_start(config, steps) - warmup
        after = optax.join_schedules(
            [optax.constant_schedule(peak), optax.linear_schedule(peak, last, max(rest - begin, 1))], [begin]
        )
    else:
        after = optax.constant_schedule(peak)
    # Step 0 already moves: warmup counts from 1.
    return optax.join_schedules([lambda step: peak * (step + 1) / (warmup + 1), after], [warmup])


def decay_start(config: OptimizerConfig, steps: int) -> int:
    """The first step of wsd's decay; before it the schedule does not depend on the number of steps."""
    return max(steps - round(config.decay_fraction * steps), min(config.warmup_steps, steps))


def steps_may_change(config: OptimizerConfig, old_steps: int, new_steps: int, done: int) -> bool:
    """Whether `done` steps run for `old_steps` had the learning rates that `new_steps` would have given them."""
    if old_steps == new_steps:
        return True
    if config.schedule == "cosine" or min(old_steps, new_steps) < config.warmup_steps:
        return False
    if config.schedule == "constant":
        return True
    return done <= min(decay_start(config, old_steps), decay_start(config, new_steps))


def stop_frozen(params: Any) -> Any:
    """The parameters, those marked as frozen without a gradient."""
    return _map_variables(lambda v: v.replace(jax.lax.stop_gradient(v.get_value())) if is_frozen(v) else v, params)


def keep_frozen(old: Any, new: Any) -> Any:
    """`new`, the parameters marked as frozen as they were: adding an update of 0 would change the sign of -0."""
    return _map_variables(lambda v, after: v if is_frozen(v) else after, old, new)


def _map_variables(f: Callable, *trees: Any) -> Any:
    return jax.tree.map(f, *trees, is_leaf=lambda x: isinstance(x, nnx.Variable))


def build(config: OptimizerConfig, steps: int, params: nnx.State) -> optax.GradientTransformation:
    """AdamW with decoupled decay; frozen parameters have no moments. `params` give the masks; abstract ones serve."""
    labels = _map_variables(lambda v: v.replace("frozen" if is_frozen(v) else "trained"), params)
    trained = _adamw(config, steps, params)
    if "frozen" not in jax.tree.leaves(labels):
        return trained
    return optax.partition({"trained": trained, "frozen": optax.set_to_zero()}, labels)


def _adamw(config: OptimizerConfig, steps: int, params: nnx.State) -> optax.GradientTransformation:
    return optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decay_mask(params),
        mu_dtype=jnp.float32,
    )
