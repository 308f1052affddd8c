"""The configs at their papers' sizes, counted by shapes alone: nothing is allocated."""

import dataclasses
import functools
import importlib
import re

import jax
import pytest
from flax import nnx

from engrax.configs import find
from engrax.models.block_style import BlockStyleConfig

SIZES = {  # published parameters in millions, layers; docs/paper_sizes.md says where they are from
    "based_360m": (360, 27),
    "gated_deltanet_340m": (340, 21),
    "gated_deltanet_1b3": (1300, 21),
    "mom_1b3": (1620, 24),
    "mom_340m": (510, 24),  # what the settings that the paper calls 340M make: it counts one memory
}
HYBRIDS = {
    "gated_deltanet_hybrid_1b3": "gated_deltanet_1b3",
    "gated_deltanet_hybrid_340m": "gated_deltanet_340m",
    "mom_hybrid_340m": "mom_340m",
}


@functools.cache
def count(model):
    """Parameters, by shapes alone."""
    params = nnx.state(nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))), nnx.Param)
    return sum(p.size for p in jax.tree.leaves(params))


@pytest.mark.parametrize("name", SIZES)
def test_configs_have_their_papers_size(name):
    model = find(name).experiment.model
    wanted, layers = SIZES[name]
    assert abs(count(model) / 1e6 / wanted - 1) < 0.02 and model.num_layers == layers, f"{count(model):,} parameters"


def test_the_papers_larger_pair_has_the_published_counts():
    """The released 1.3B settings, a mixture and its baseline: 1.62 B and 1.21 B parameters, not the same number."""
    small = find("mom_340m").experiment.model
    released = dataclasses.replace(small.mixers[0].base, heads=4, head_dim=256, value_dim=256)
    mixer = dataclasses.replace(small.mixers[0], base=released)
    mixture = dataclasses.replace(
        small, dim=2048, mlp_hidden=5632, mixers=(mixer,), layout=BlockStyleConfig(tied=False)
    )
    baseline = dataclasses.replace(mixture, mixers=(released,))
    assert (round(count(mixture) / 1e9, 2), round(count(baseline) / 1e9, 2)) == (1.62, 1.21)


def test_a_mixture_is_not_matched_to_its_baseline_in_parameters():
    """What docs/paper_sizes.md says of the 340M settings: one memory alone, and the memories that a token uses."""
    model = find("mom_340m").experiment.model
    (mixture,) = model.mixers
    one, used = (
        dataclasses.replace(model, mixers=(m,)) for m in (mixture.base, dataclasses.replace(mixture, memories=2))
    )
    assert (round(count(one) / 1e6, 1), round(count(used) / 1e6)) == (310.3, 412)
    assert round(100 * (count(model) / count(one) - 1)) == 65


@pytest.mark.parametrize("name", [*SIZES, "titans_1b3", *HYBRIDS])
def test_configs_say_their_size(name):
    told = re.search(r"(\d+)\s+M\s+parameters", importlib.import_module(f"engrax.configs.{name}").__doc__)
    assert int(told[1]) == round(count(find(name).experiment.model) / 1e6)


@pytest.mark.parametrize("hybrid, pure", HYBRIDS.items())
def test_hybrids_count_what_their_layers_do(hybrid, pure):
    """No count is published: three of four layers are those of the pure model, the fourth has 4 d^2 and an MLP."""
    hybrid, pure = (find(name).experiment.model for name in (hybrid, pure))
    d, around = hybrid.dim, hybrid.vocab_size * hybrid.dim + hybrid.dim
    assert (pure.dim, pure.vocab_size, pure.mlp_width) == (d, hybrid.vocab_size, hybrid.mlp_width)
    memory_layer = (count(pure) - around) / pure.num_layers
    window_layer = 4 * d * d + 3 * d * hybrid.mlp_width + 2 * d
    assert count(hybrid) == around + hybrid.repeat * (3 * memory_layer + window_layer)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_have_a_window_in_every_fourth_layer(name):
    model = find(name).experiment.model
    *memories, window = model.mixers
    assert len(memories) == 3 and len({m.registered_name for m in memories}) == 1
    assert window.registered_name == "attention" and window.window
    assert nnx.eval_shape(lambda: model.build(rngs=nnx.Rngs(0))).config == model
