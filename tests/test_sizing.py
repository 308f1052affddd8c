"""Mixers by the size of their state: every registered one takes a size, in bytes of the states themselves."""

import dataclasses

import jax
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MIXERS
from engrax.layers.mixer import MixerConfig, as_mixer
from engrax.layers.sizing import NEAR, sized, state_bytes

DIM, SIZES = 32, (16384, 65536, 262144)
ONE_SIZE = {"hopfield_layer"}  # its patterns are learned; its state is a segment's id
TOO_SMALL = {("memorizing", 16384)}  # 16 segments of two tokens are larger
QUICK = ("attention", "deltanet", "hopfield_layer", "mom", "titans")


def held(config: MixerConfig) -> int:
    """The bytes of a real state."""
    module = as_mixer(config.build(DIM, rngs=nnx.Rngs(0)))
    return sum(leaf.nbytes for leaf in jax.tree.leaves(module.init_state(1)))


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.deep) for n in MIXERS])
def test_every_mixer_takes_a_size(name):
    plain = MIXERS[name]()
    for size in SIZES:
        if name in ONE_SIZE or (name, size) in TOO_SMALL:
            with pytest.raises(UserError, match="one size" if name in ONE_SIZE else "the nearest has"):
                sized(plain, DIM, size)
            continue
        found = sized(plain, DIM, size)
        assert 1 / NEAR <= state_bytes(found, DIM) / size <= NEAR
        if size == SIZES[0]:
            assert state_bytes(found, DIM) == held(found)
            # All but the settings that grow with the state is as before.
            grown = plain.scaled(2.0)
            for field in dataclasses.fields(plain):
                old, new = (getattr(config, field.name) for config in (plain, found))
                assert old == new or getattr(grown, field.name) != old, field.name


def test_scaling_reaches_the_mixers_inside():
    found = MIXERS["titans_mag"]().scaled(0.5)
    assert (found.memory.head_dim, found.memory.hidden, found.attention.window) == (16, 32, 32)
    assert found.memory.heads == 4 and found.attention.head_dim == 32
