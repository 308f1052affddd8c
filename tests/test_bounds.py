"""Theoretical bounds hold after rounding: unit keys, rotary angles at late positions, states over long rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.laws.gates import KEEPING, direction, extreme_gates
from engrax.laws.subject import in_bfloat16
from engrax.layers import DeltaNetConfig, GatedDeltaNetConfig, KDAConfig, MoMConfig, TitansConfig
from engrax.layers.attention.rope import RopeScaling, rotate
from engrax.layers.common.modules import l2_normalise


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("width", [1, 2, 7, 64, 256])
def test_a_rounded_unit_vector_is_no_longer_than_one(dtype, width):
    x = np.random.default_rng(width).standard_normal((2000, width))
    y = np.asarray(l2_normalise(jnp.asarray(x, dtype)).astype(jnp.float32), np.float64)
    lengths = np.linalg.norm(y, axis=-1)
    assert lengths.max() <= 1.0 and lengths.min() > 1 - 3 * float(jnp.finfo(dtype).eps) - 1e-4


SCALINGS = RopeScaling(), RopeScaling("linear", factor=4.0), RopeScaling("llama3", factor=8.0)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling.kind)
def test_rotary_angles_are_exact_at_late_positions(scaling):
    """EleutherAI/gpt-neox#1003 and huggingface/transformers#29285: angles in 16 bits are arbitrary at late positions. A
    float32 product has this error from a million tokens on."""
    position = np.array([[0, 1, 4095, 10**6, 2**24 + 1, 2**30 + 12345, 2**31 - 1]], np.int64)
    x = np.random.default_rng(0).standard_normal((1, position.shape[1], 2, 16))
    frequency = scaling.apply(10_000.0 ** (-np.arange(8) / 8))
    turned = (x[..., :8] + 1j * x[..., 8:]) * np.exp(1j * position[..., None, None] * frequency)
    found = rotate(jnp.asarray(x, jnp.float32), jnp.asarray(position, jnp.int32), 10_000.0, scaling)
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=3e-6)


DELTA = dict(heads=2, head_dim=32, max_beta=2.0)


@pytest.mark.parametrize(
    "config",
    [
        DeltaNetConfig(**DELTA),
        GatedDeltaNetConfig(value_dim=16, **DELTA),
        KDAConfig(**DELTA),
        MoMConfig(base=DeltaNetConfig(**DELTA), memories=2, top_k=1),
        TitansConfig(heads=2, head_dim=16),
    ],
    ids=lambda config: config.registered_name,
)
def test_one_token_repeated_keeps_the_state_bounded(config):
    """24,576 equal tokens in bfloat16, with every gate saturated by its projection: the rules are barely stable there.

    Related: fla-org/flash-linear-attention#99 and #537, non-finite values of the delta rule in 16 bits."""
    dim, blocks, block = 64, 24, 1024
    graphdef, params = nnx.split(config.build(dim, rngs=nnx.Rngs(0)))
    (kept,) = (moved for name, moved in extreme_gates(params, dim) if name == KEEPING)
    token = (np.sin(np.arange(dim)) + direction(dim)).astype(jnp.bfloat16)
    x = jnp.broadcast_to(jnp.asarray(token), (1, block, dim))

    @jax.jit
    def run(params):
        mixer = nnx.merge(graphdef, params)
        return jax.lax.scan(lambda state, _: (mixer(x, state)[1], None), mixer.init_state(1), length=blocks)[0]

    state = run(in_bfloat16(kept))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.float32)
    assert largest < 100
