"""Which of the two engines of test-time memories runs a rule, and that both give the same where either can."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MIXERS, MemoryConfig, TitansConfig
from engrax.layers.test_time.rule import Rule
from engrax.pallas_kernels import NeuralMemoryState
from engrax.pallas_kernels.dispatch import recorded_calls
from engrax.tests.modules import same_parameters

SMALL = dict(heads=2, head_dim=4, hidden=6, chunk_size=4, persistent_tokens=2)
BASE = MemoryConfig(**SMALL)
IDS = jnp.asarray([[0] * 6 + [-1] + [1] * 7 + [4] * 7, [2] * 13 + [3] * 8])
BY_OPERATION = {"titans": (True, True, True, True), "test_time_memory": (False, False, False, True)}  # by example


@pytest.mark.parametrize("name", [n for n in MIXERS if issubclass(MIXERS[n], (MemoryConfig, TitansConfig))])
def test_which_engine_runs_a_preset(name):
    """The operation runs exactly the rules that are its own; what else is published here has another rule."""
    configs = [getattr(config, "general", config) for config in MIXERS[name].examples()]
    wanted = BY_OPERATION.get(name, (False,) * len(configs))
    assert tuple(config.rule().operation for config in configs) == wanted
    for config, by_operation in zip(configs, wanted):
        graphdef, params = nnx.split(nnx.eval_shape(lambda config=config: config.build(8, rngs=nnx.Rngs(0))))
        with recorded_calls() as calls:
            state = jax.eval_shape(lambda p, g=graphdef: nnx.merge(g, p)(jnp.zeros((2, 9, 8)))[1], params)
        assert isinstance(state.memory, NeuralMemoryState) == by_operation == bool(calls)


@pytest.mark.parametrize(
    "changes, by_operation",
    [
        ({}, True),
        (dict(structure="linear", optimizer="sgd"), True),
        (dict(depth=4, activation="tanh", target="residual"), True),
        (dict(depth=5), False),
        (dict(bias=True), False),
        (dict(normed=True), False),
        (dict(structure="residual_mlp"), False),
        (dict(structure="factorised"), False),
        (dict(loss="huber"), False),
        (dict(retention="row_norm"), False),
        (dict(momentum_order=2), False),
        (dict(optimizer="muon"), False),
        (dict(window=2), False),
        (dict(order="read_then_write"), False),
        (dict(target="next"), False),
        (dict(reset_every=2), False),
        (dict(structure="linear", forgetting="channel"), False),
        (dict(forgetting="head", gradient_at="decayed"), True),
    ],
)
def test_what_the_operation_does_not_have_runs_in_the_engine(changes, by_operation):
    config = dataclasses.replace(BASE, **changes)
    assert config.rule().operation == by_operation
    if by_operation:
        assert dataclasses.replace(config, implementation="xla").rule().implementation == "xla"
    else:
        with pytest.raises(UserError, match="operation neural_memory, which does not have this rule"):
            dataclasses.replace(config, implementation="xla")


OWN_RULES = {
    "matrix": dict(structure="linear", optimizer="sgd", gradient_at="decayed", feature_degree=2),
    "deep": dict(depth=3, target="residual", forgetting="head", activation="silu"),
}


@pytest.mark.parametrize(
    "name", [pytest.param("matrix", marks=pytest.mark.deep), pytest.param("deep", marks=pytest.mark.long)]
)
def test_both_engines_give_the_same(name, monkeypatch, x64):
    """Values, the state's matrices and gradients of the rules that the operation has, on packed rows, also cut."""
    config = MemoryConfig(**SMALL, **OWN_RULES[name])
    parts = (slice(0, 6), slice(6, None)) if name == "deep" else (slice(None),)
    module = same_parameters(config)[0]
    graphdef, params = nnx.split(module)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 21, 8)))

    def both(params):
        def run(params, x):
            module, found, state = nnx.merge(graphdef, params), [], None
            for part in parts:
                y, state = module(x[:, part], state, IDS[:, part])
                found.append(y)
            return jnp.concatenate(found, axis=1), jax.tree.leaves(module._engine.matrices(state.memory)[0])

        found, pull = jax.vjp(run, params, x)
        return found, pull(jax.tree.map(jnp.cos, found))

    by_operation = jax.jit(both)(params)
    monkeypatch.setattr(Rule, "operation", False)
    by_engine = jax.jit(lambda params: both(params))(params)
    for a, b in zip(*map(jax.tree.leaves, (by_operation, by_engine)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10 * (1 + np.abs(b).max()))


@pytest.mark.deep
@pytest.mark.parametrize("depth, momentum", [(1, False), (4, True)])
def test_titans_is_a_setting_of_it(depth, momentum, x64):
    """Its module has the parameters of the general one, at other names."""
    titans = TitansConfig(**SMALL, depth=depth, momentum=momentum)
    a, b = same_parameters(titans, titans.general)
    assert type(a.initial) is not type(b.initial)
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 21, 8)))
    for ids in (None, IDS):
        np.testing.assert_array_equal(b(x, None, ids)[0], a(x, None, ids)[0])
