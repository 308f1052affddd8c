"""Schedules: their values, what may change in a run that continues, and functions that are no schedule."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.tests.experiments import small
from engrax.train import (
    SCHEDULES,
    AdamWConfig,
    CheckpointConfig,
    ConstantConfig,
    CosineConfig,
    InfiniteConfig,
    InverseRootConfig,
    LinearConfig,
    ScheduleConfig,
    WSDConfig,
    WSDSConfig,
    runs,
)
from engrax.train.checkpoint import Checkpoints
from engrax.train.optimizers import base as optimizers
from engrax.train.schedules.base import first_difference

# (schedule of 100 steps and a peak of 1 after a warmup of 10, {step: rate by hand})
VALUES = [
    (ConstantConfig(warmup_steps=10), {10: 1.0, 99: 1.0}),
    (CosineConfig(warmup_steps=10, final_fraction=0.1), {10: 1.0, 55: 0.55, 100: 0.1}),
    (WSDConfig(warmup_steps=10, decay_fraction=0.2, final_fraction=0.0), {10: 1.0, 80: 1.0, 90: 0.5, 100: 0.0}),
    (LinearConfig(warmup_steps=10), {10: 1.0, 55: 0.5, 91: 0.1, 100: 0.0}),
    (LinearConfig(warmup_steps=10, final_fraction=0.5), {55: 0.75, 100: 0.5}),
    (InverseRootConfig(warmup_steps=10), {10: 1.0, 43: 0.5, 98: 1 / 3}),  # sqrt(11 / 44), sqrt(11 / 99)
    # Decays of 6 steps before 60 and of 10 before 100: halfway 1 / rate is (1 + 10) / 2.
    (
        WSDSConfig(warmup_steps=10, ends=(60,)),
        {10: 1.0, 54: 1.0, 57: 2 / 11, 60: 1.0, 90: 1.0, 95: 2 / 11, 100: 0.1},
    ),
    (WSDSConfig(warmup_steps=10, ends=(60, 62), final_fraction=0.5), {60: 1.0, 61: 2 / 3, 62: 1.0}),  # from 60, not 56
    (InfiniteConfig(warmup_steps=10, cooldown_steps=40), {10: 1.0, 30: 0.75, 50: 0.5, 99: 0.5}),
    (
        InfiniteConfig(warmup_steps=10, cooldown_steps=40, anneal_steps=20),
        {50: 0.5, 80: 0.5, 90: 0.5 * math.sqrt(0.1), 100: 0.05},
    ),
    (InfiniteConfig(warmup_steps=10, cooldown_steps=0, constant_fraction=0.5), {10: 0.5, 50: 0.5}),
]


@pytest.mark.parametrize("config, values", VALUES, ids=lambda x: getattr(x, "registered_name", ""))
def test_the_rates_are_those_worked_out_by_hand(config, values):
    rate = config.rate(1.0, 100)
    for step, wanted in ({0: 1 / 11, 9: 10 / 11} | values).items():
        assert float(rate(step)) == pytest.approx(wanted, rel=1e-6, abs=1e-6), step


def test_every_schedule_has_its_values():
    assert {type(config) for config, _ in VALUES} == {SCHEDULES[name] for name in SCHEDULES}


def test_resume_is_exact_with_every_schedule(tmp_path):
    """Seven steps, a checkpoint, and five more from it, equal twelve steps to the last bit; one program for all."""
    params = nnx.State({"x": nnx.Param(jnp.linspace(-1.0, 1.0, 6).reshape(2, 3), axes=(None, "mlp"), role="matrix")})
    every = [config for config, _ in VALUES] + [SCHEDULES[name]() for name in SCHEDULES]
    every = [dataclasses.replace(config, warmup_steps=2) for config in every]
    configs = {str(n): AdamWConfig(learning_rate=0.1, schedule=config) for n, config in enumerate(every)}
    rules = {name: optimizers.build(config, 12, params) for name, config in configs.items()}

    @jax.jit
    def step(states):
        new = {}
        for name, tx in rules.items():
            x = states[name]["params"]
            updates, opt_state = tx.update(jax.tree.map(jnp.sin, x), states[name]["opt_state"], x)
            new[name] = {"params": jax.tree.map(jnp.add, x, updates), "opt_state": opt_state}
        return new

    states = {name: {"params": params, "opt_state": tx.init(params)} for name, tx in rules.items()}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    for n in range(1, 13):
        states = step(states)
        if n == 7:
            checkpoints.save(7, states, {}, None)
            checkpoints.wait()
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), states)
    again, _ = checkpoints.restore(like, 7)
    checkpoints.close()
    for _ in range(5):
        again = step(again)
    for one, other in zip(jax.tree.leaves(states), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)


WSD, WSDS, INFINITE = WSDConfig(warmup_steps=10), WSDSConfig(warmup_steps=10), InfiniteConfig(warmup_steps=10)
ANNEALED = dataclasses.replace(INFINITE, anneal_steps=20)


@pytest.mark.parametrize(
    "old, steps, new, new_steps, done, allowed",
    [
        (WSD, 100, WSD, 200, 81, True),
        (WSD, 100, WSD, 200, 82, False),
        (WSD, 200, WSD, 100, 81, True),
        (WSD, 200, WSD, 100, 90, False),
        (WSD, 100, WSD, 5, 6, False),  # a warmup of 5
        (CosineConfig(warmup_steps=10), 100, CosineConfig(warmup_steps=10), 200, 11, True),
        (CosineConfig(warmup_steps=10), 100, CosineConfig(warmup_steps=10), 200, 12, False),
        (ConstantConfig(warmup_steps=10), 100, ConstantConfig(warmup_steps=10), 200, 100, True),
        (ConstantConfig(warmup_steps=10), 100, WSD, 200, 100, True),  # a constant run may be decayed
        (InverseRootConfig(warmup_steps=10), 100, InverseRootConfig(warmup_steps=10), 200, 100, True),
        (LinearConfig(warmup_steps=10), 100, LinearConfig(warmup_steps=10), 200, 100, False),
        (WSDS, 100, WSDS, 200, 100, False),  # it has decayed, and forgets it
        (WSDS, 100, dataclasses.replace(WSDS, ends=(100,)), 200, 100, True),
        (INFINITE, 100, INFINITE, 200, 100, True),
        (INFINITE, 100, ANNEALED, 120, 100, True),
        (ANNEALED, 100, ANNEALED, 200, 100, False),
    ],
)
def test_a_run_may_go_on_while_its_past_stays_the_same(old, steps, new, new_steps, done, allowed):
    before, after = (small(steps=n, optimizer=AdamWConfig(schedule=c)) for c, n in ((old, steps), (new, new_steps)))
    if allowed:
        runs.refuse_differences(before, after, done, "run")
        return
    with pytest.raises(UserError, match=f"differs in steps.*the {old.registered_name} schedule gave step") as told:
        runs.refuse_differences(before, after, done, "run")
    rates = (e.optimizer.rate(e.steps) for e in (before, after))
    step, was, would_be = first_difference(*rates, done)
    assert f"gave step {step + 1} the learning rate {was:.6g}, now it would be {would_be:.6g}" in str(told.value)


def test_the_past_must_be_the_same_in_other_fields_too():
    with pytest.raises(UserError, match="differs in optimizer.learning_rate"):
        after = small(optimizer=AdamWConfig(learning_rate=0.1, schedule=ConstantConfig()))
        runs.refuse_differences(small(optimizer=AdamWConfig(schedule=ConstantConfig())), after, 0, "run")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(ScheduleConfig):
    """A user's schedule, whose rate after the warmup is any function."""

    registered_name = "mine"
    function: object = None

    def after_warmup(self, peak, steps, warmup):
        return self.function


@pytest.mark.parametrize(
    "function, told",
    [
        (lambda step: 0.1 if step < 5 else 0.2, "the schedule mine cannot be compiled .Tracer"),
        (lambda step: 1 / jnp.sin(step) + np.random.rand(), "mine changes each time it is read"),
        (lambda step: jnp.ones(3) * step, "mine does not return one number"),
    ],
)
def test_what_is_no_pure_function_of_the_step_is_refused(function, told):
    with pytest.raises(UserError, match=told):
        Mine(function=function).rate(1.0, 10)
    assert float(Mine(warmup_steps=0, function=jnp.sqrt).rate(1.0, 10)(4)) == 2.0


@pytest.mark.parametrize(
    "config, fields, told",
    [
        (WSDSConfig, {"ends": (5, 5)}, "ends=.5, 5. must be positive and ascending"),
        (WSDSConfig, {"final_fraction": 0.0}, "final_fraction=0.0 must be above 0"),
        (InfiniteConfig, {"final_fraction": 0.6}, "at most constant_fraction=0.5"),
        (InfiniteConfig, {"cooldown_steps": -1}, "cooldown_steps=-1"),
        (LinearConfig, {"final_fraction": -0.1}, "final_fraction=-0.1"),
    ],
)
def test_settings_that_make_no_schedule_are_refused(config, fields, told):
    with pytest.raises(UserError, match=told):
        config(**fields)
