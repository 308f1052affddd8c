"""The parts of the gated delta rule's chunkwise form: the triangular inverse, one chunk and its derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels.common.decay import Decay, cumulative_decay
from engrax.pallas_kernels.gated_delta_rule.chunk import DeltaForm, DeltaTokens, chunk
from engrax.pallas_kernels.gated_delta_rule.inverse import ladder_inverse, unit_lower_inverse
from engrax.pallas_kernels.gated_delta_rule.reference import gated_delta_rule_reference
from engrax.pallas_kernels.linear_attention.chunk import ScalarDecay
from engrax.tests.neural_memory_problems import assert_close
from engrax.tests.op_problems import compiled


def system(keys, size, beta):
    """Returns A = beta K K^T below the diagonal, for unit keys."""
    rng = np.random.default_rng(0)
    k, common = rng.normal(size=(size, 32)), rng.normal(size=32)
    k = {"random": k, "correlated": 3 * common + k, "identical": np.broadcast_to(common, k.shape)}[keys]
    k = k / np.linalg.norm(k, axis=1, keepdims=True)
    return np.tril(beta * k @ k.T, -1)


def relative(actual, wanted):
    return np.abs(np.asarray(actual, np.float64) - wanted).max() / np.abs(wanted).max()


@pytest.mark.parametrize("invert", [unit_lower_inverse, ladder_inverse])
@pytest.mark.parametrize("size", [1, 2, 5, 16, 24, 63, 64, 100])
def test_inverse_at_every_size(size, invert, x64):
    a = system("correlated", size, 1.0)
    assert relative(invert(jnp.asarray(a)), np.linalg.inv(np.eye(size) + a)) < 1e-13


@pytest.mark.parametrize("invert", [unit_lower_inverse, ladder_inverse])
@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("keys", ["random", "correlated", "identical"])
def test_inverse_is_stable_in_float32(keys, beta, invert):
    a = system(keys, 64, beta)
    assert relative(invert(jnp.asarray(a, jnp.float32)), np.linalg.inv(np.eye(64) + a)) < 1e-5


def test_what_stands_on_and_above_the_diagonal_is_not_read(x64):
    a = system("random", 20, 1.0)
    noise = np.triu(np.random.default_rng(1).normal(size=a.shape))
    assert_close(unit_lower_inverse(jnp.asarray(a + noise)), unit_lower_inverse(jnp.asarray(a)), 1e-15)


def test_derivative_of_the_inverse(x64):
    a = jnp.asarray(np.stack([system("correlated", 24, 1.5), system("random", 24, 1.0)]))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=a.shape))
    gradient = jax.grad(lambda a: jnp.sum(weights * unit_lower_inverse(a)))(a)
    wanted = jax.grad(lambda a: jnp.sum(weights * jnp.linalg.inv(jnp.eye(24) + jnp.tril(a, -1))))(a)
    assert_close(gradient, wanted, 1e-12)


@pytest.mark.parametrize("invert", [unit_lower_inverse, ladder_inverse])
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_one_chunk_and_its_derivative(gate, invert, x64):
    """`chunk` as a kernel runs it, two-dimensional, and `jax.vjp` of it, with X computed or given."""
    rng, size, key, value = np.random.default_rng(0), 24, 8, 6
    widths = {"none": (), "scalar": (1,), "channel": (key,)}
    q, k, v, state = (jnp.asarray(rng.normal(size=s)) for s in ((size, key), (size, key), (size, value), (key, value)))
    k = k / jnp.linalg.norm(k, axis=1, keepdims=True)
    beta = jnp.asarray(2 * rng.random((size, 1)))
    g = jnp.asarray(rng.choice([0.0, -1e-4, -0.5, -50.0, -np.inf], size=(size, *widths[gate])))

    def one_chunk(q, k, v, beta, g, state, inverse=None):
        decay = None
        if gate != "none":
            decay = cumulative_decay(g, 0)
            decay = decay if gate == "channel" else ScalarDecay(decay, Decay(*(x.T for x in decay)))
        return chunk(DeltaForm(0.5, q.dtype), DeltaTokens(q, k, v, beta, decay), state, inverse, invert)

    def tokens(q, k, v, beta, g, state):
        batch = (x[None, :, None] for x in (q, k, v, beta[:, 0], g[:, 0] if gate == "scalar" else g))
        *batch, g = batch
        g = None if gate == "none" else g
        out, state = gated_delta_rule_reference(*batch, g, state[None, None], None, scale=0.5, num_segments=None)
        return out[0, :, 0], state[0, 0]

    arrays = (q, k, v, beta, g, state)
    bars = (jnp.asarray(rng.normal(size=(size, value))), jnp.asarray(rng.normal(size=(key, value))))

    @compiled
    def pull(arrays, inverse):
        result, pull_chunk = jax.vjp(lambda *arrays: one_chunk(*arrays, inverse=inverse)[0], *arrays)
        return result, pull_chunk(bars)

    @compiled
    def pull_tokens(arrays):
        result, pull = jax.vjp(tokens, *arrays)
        return result, pull(bars)

    wanted = pull_tokens(arrays)
    assert_close(pull(arrays, None), wanted)
    assert_close(pull(arrays, one_chunk(*arrays)[1]), wanted)
