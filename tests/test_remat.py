"""What a forward pass keeps: by policy, by kind of layer, and in the host's memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax import models
from engrax.errors import UserError
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig

MIXERS_TRIED = (MIXERS["attention"](heads=2, head_dim=8), MIXERS["linear_attention"](heads=2, head_dim=4, conv_width=1))
CONFIG = LanguageModelConfig(vocab_size=16, dim=16, mixers=MIXERS_TRIED, repeat=2, mlp_hidden=20)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 12)), jnp.int32)


def loss_of(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    graphdef, params = nnx.split(models.build(config, rngs=nnx.Rngs(0)))
    return lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(TOKENS).hidden)), params


def products(remat, kind):
    """How many products of the MLPs, whose width 20 is theirs alone, or of all else forward and backward have."""
    loss, params = loss_of(remat)

    def count(jaxpr):
        found = 0
        for equation in jaxpr.eqns:
            shapes = [x.aval.shape for x in (*equation.invars, *equation.outvars)]
            found += equation.primitive.name == "dot_general" and any(20 in s for s in shapes) == (kind == "mlp")
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(value, "jaxpr", value)
                found += count(inner) if hasattr(inner, "eqns") else 0
        return found

    return count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)


def test_kinds_of_layers_have_their_own_policies():
    none, full = products("none", "mlp"), products("full", "mlp")
    own = products("none,mlp=full", "mlp")
    assert none < own == products("full,attention=none", "mlp") < full  # a repeat also recomputes what lies between
    assert products("full,mlp=dots", "mlp") == none
    assert products("none,mlp=full", "mixer") == products("none", "mixer") < products("none,attention=full", "mixer")


LONG = [pytest.param(remat, marks=pytest.mark.long) for remat in ("offload", "offload_dots")]


@pytest.mark.parametrize("remat", ["offload,mlp=full", *LONG])
def test_gradients_are_the_same_and_what_is_kept_moves_to_the_host(remat):
    loss, params = loss_of("none")
    wanted = jax.jit(jax.grad(loss))(params)
    traced = {name: jax.jit(jax.grad(loss_of(name)[0])).trace(params) for name in (remat, "full")}
    assert "<host>" in str(traced[remat].jaxpr) and "<host>" not in str(traced["full"].jaxpr)
    for a, b in zip(jax.tree.leaves(traced[remat].lower().compile()(params)), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "remat, told",
    [
        ("dts", "unknown remat 'dts'; did you mean 'dots'?"),
        ("dots,mlp=fall", "unknown remat 'fall'; did you mean 'full'?"),
        ("dots,atention=full", "names 'atention'; did you mean 'attention'?"),
    ],
)
def test_unknown_policies_and_kinds_are_named(remat, told):
    with pytest.raises(UserError) as error:
        dataclasses.replace(CONFIG, remat=remat)
    assert told in str(error.value)
