"""Transformer-XL and Memorizing Transformer attention against their formulas, token by token in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MemorizingConfig, TransformerXLConfig

DIM, HEADS, WIDTH, LENGTH, TOKENS = 8, 2, 4, 4, 15
LOCAL = TransformerXLConfig(heads=HEADS, head_dim=WIDTH, segment_length=LENGTH)
NEIGHBOURS = MemorizingConfig(heads=HEADS, head_dim=WIDTH, segment_length=LENGTH, bank_size=8, neighbours=3)


def build(config):
    """A module with noise on its parameters."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(DIM, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(1)
    return nnx.merge(graphdef, jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape) / 2, p.dtype), params))


def heads(y):
    return np.asarray(y, np.float64).reshape(TOKENS, HEADS, WIDTH)


def softmax(a):
    a = np.exp(a - a.max())
    return a / a.sum()


def by_formula(module, x, neighbours=0, bank=0):
    """The mixed tokens [T, D] before nothing but their formula."""
    kernel = lambda layer: np.asarray(layer.kernel[...], np.float64)  # noqa: E731
    q, (k, v) = heads(x @ kernel(module.q)), (heads(y) for y in np.split(x @ kernel(module.kv), 2, axis=-1))
    distance = np.arange(TOKENS)[:, None] * 10_000.0 ** -(np.arange(WIDTH // 2) / (WIDTH // 2))
    r = heads(np.concatenate([np.sin(distance), np.cos(distance)], axis=1) @ kernel(module.distance))
    u, w = np.asarray(module.content_bias[...]), np.asarray(module.distance_bias[...])
    unit = lambda y: y / np.linalg.norm(y, axis=-1, keepdims=True)  # noqa: E731
    out = np.zeros((TOKENS, HEADS, WIDTH))
    for i in range(TOKENS):
        first = max(i // LENGTH - 1, 0) * LENGTH
        old = range(max(i // LENGTH * LENGTH - bank, 0), i // LENGTH * LENGTH)  # complete segments in the buffer
        for h in range(HEADS):
            seen = range(first, i + 1)
            a = [(q[i, h] + u[h]) @ k[j, h] + (q[i, h] + w[h]) @ r[i - j, h] for j in seen]
            out[i, h] = softmax(np.asarray(a) / WIDTH**0.5) @ v[first : i + 1, h]
            if neighbours and len(old):
                near = sorted(old, key=lambda j, h=h, i=i: -unit(q[i, h]) @ unit(k[j, h]))[:neighbours]
                cos = np.asarray([unit(q[i, h]) @ unit(k[j, h]) for j in near])
                found = softmax(float(module.recall_scale[...][h]) * cos) @ v[near, h]
                gate = 1 / (1 + np.exp(-float(module.gate_bias[...][h])))
                out[i, h] = gate * found + (1 - gate) * out[i, h]
    return out.reshape(TOKENS, -1) @ kernel(module.out)


@pytest.mark.parametrize("config, sizes", [(LOCAL, {}), (NEIGHBOURS, dict(neighbours=3, bank=8))])
def test_the_mixer_is_its_formula(config, sizes):
    module = build(config)
    x = np.random.default_rng(0).standard_normal((2, TOKENS, DIM)).astype(np.float32)
    y, _ = jax.jit(lambda x: module(x))(x)
    for row in range(2):
        np.testing.assert_allclose(y[row], by_formula(module, x[row].astype(np.float64), **sizes), atol=2e-5)


def test_no_gradient_reaches_the_segment_before():
    module = build(LOCAL)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, TOKENS, DIM)), jnp.float32)
    last = TOKENS // LENGTH * LENGTH
    gradient = np.abs(np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(module(x)[0][:, last:] ** 2)))(x)))[0].max(axis=1)
    assert np.all(gradient[:last] == 0) and np.all(gradient[last:] > 0)


@pytest.mark.parametrize(
    "change, says", [(dict(bank_size=10), "not a multiple of segment_length=4"), (dict(neighbours=9), "between 1 and")]
)
def test_settings_that_do_not_fit_are_refused(change, says):
    sizes = dict(heads=HEADS, head_dim=WIDTH, segment_length=LENGTH, bank_size=8, neighbours=3) | change
    with pytest.raises(UserError, match=says):
        MemorizingConfig(**sizes)
