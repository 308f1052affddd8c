"""Modules made and called as compiled programs: run eagerly, every operation of theirs is compiled by itself."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def graph(config, dim=8):
    """The static part of the config's module."""
    return nnx.split(nnx.eval_shape(lambda: config.build(dim, rngs=nnx.Rngs(0))), nnx.Param)[0]


def parameters(config, dim=8, seeds=(0,)):
    """The config's parameters, one tree for each seed."""
    init = jax.jit(lambda key: nnx.state(config.build(dim, rngs=nnx.Rngs(key)), nnx.Param))
    found = [init(jax.random.key(seed)) for seed in seeds]
    return found if len(found) > 1 else found[0]


def build(config, dim=8):
    """The config's module."""
    return nnx.merge(graph(config, dim), parameters(config, dim))


def compiled(function):
    """`function(module, *arrays)` as one program, compiled again in every call."""

    def call(module, *args):
        graphdef, params = nnx.split(module)
        return jax.jit(lambda params, *args: function(nnx.merge(graphdef, params), *args))(params, *args)

    return call


outputs = compiled(lambda module, *args: module(*args)[0])


def same_parameters(*configs):
    """Mixers with the same parameters, random ones."""
    built = [build(config) for config in configs]
    params = [nnx.state(m, nnx.Param) for m in built]
    values = jax.tree.leaves(params[0])
    rng = np.random.default_rng(1)
    values = [jnp.asarray(np.asarray(p) + 0.5 * rng.standard_normal(p.shape)) for p in values]
    for module, p in zip(built, params):
        assert [a.shape for a in jax.tree.leaves(p)] == [a.shape for a in values]
        nnx.update(module, jax.tree.unflatten(jax.tree.structure(p), values))
    return built
