"""Rows split over devices (`parallel.sequence`): the numbers of whole rows; an exchange that does not grow with T."""

import dataclasses
import json

import pytest

from engrax.data import MQAR
from engrax.errors import UserError
from engrax.layers import MIXERS, AttentionConfig, GatedDeltaNetConfig, PrefixLinearAttentionConfig
from engrax.models import MODELS, LanguageModelConfig
from engrax.tests.experiments import tiny
from engrax.train import ParallelConfig
from engrax.train.trainer import check

CODE = """
import json, re, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from engrax import models
from engrax.layers import MIXERS
from engrax.train import ParallelConfig, sharding, train_step

def build(names, dtype):
    mixers = tuple(MIXERS[name].examples()[index] for name, index in names)
    config = models.LanguageModelConfig(vocab_size=12, dim=8, mixers=mixers, repeat=1, mlp_hidden=12)
    graphdef, params = nnx.split(models.build(config, rngs=nnx.Rngs(0)), nnx.Param)
    noise = lambda x: x.astype(dtype) + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape, dtype)
    return graphdef, jax.tree.map(noise, params)

def packed(rows, length, seed):
    # Documents of any length, so that they straddle pieces, with filler inside a row and padding after one.
    rng = np.random.default_rng(seed)
    ids = np.sort(rng.integers(0, 4, (rows, length)), axis=1).astype(np.int32)
    ids[0, length // 4 : length // 4 + 3], ids[-1, length - length // 3 :] = -2, -1
    tokens, targets = rng.integers(0, 12, (2, rows, length)).astype(np.int32)
    return dict(tokens=tokens, targets=np.where(ids >= 0, targets, -1).astype(np.int32), segment_ids=ids)

def step_of(graphdef, dtype, layout):
    devices = jax.devices()[: layout["data"] * layout["sequence"]]
    mesh = sharding.make_mesh(ParallelConfig(**layout), 2, chosen=devices)
    loss = train_step._loss_over_pieces(train_step.make_loss(graphdef, dtype), mesh)

    def step(params, batch, memory):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            (value, (_, memory)), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, memory)
        return value, jax.tree.map(lambda x, g: x - 1e-3 * g, params, grads), memory

    whole, rows = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, sharding.batch_spec(mesh))
    return jax.jit(step, in_shardings=(whole, rows, whole), out_shardings=whole)

def train(names, layout, length, dtype=jnp.float64, carried=True):
    # Losses of three steps, the third from a carried memory; the parameters and memory after them.
    graphdef, params = build(names, dtype)
    step, memory, losses = step_of(graphdef, dtype, layout), None, []
    for n in range(3):
        if n == 2 and carried:
            memory = nnx.merge(graphdef, params).init_memory(2)
            for _ in range(2):
                _, _, memory = step(params, packed(2, length, 9), memory)
        value, params, memory = step(params, packed(2, length, n), memory)
        losses.append(float(value))
    return losses, jax.device_get((params, memory))

def difference(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b))
    return max(float(np.max(np.abs(x - y) / (1 + np.abs(x)), initial=0)) for x, y in pairs)

def collectives(names, layout, length):
    graphdef, params = build(names, jnp.float32)
    text = step_of(graphdef, jnp.float32, layout).lower(params, packed(2, length, 0), None).compile().as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all"
    lines = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?[(]", re.sub(r"/[*].*?[*]/", "", text))
    return sorted(shape for line in lines for shape in re.findall(r"\\w+\\[[0-9,]*\\]", line))
"""

AGREE = (
    CODE
    + """
out = []
for names, layout, length, carried in json.loads(sys.argv[1]):
    one = train(names, dict(data=1, sequence=1), length, carried=carried)
    many = train(names, layout, length, carried=carried)
    out.append([names, one[0], many[0], difference(one, many)])
print(json.dumps(out))
"""
)
X64 = {"JAX_ENABLE_X64": "1"}


def agree(run_python, cases):
    text = run_python(AGREE, args=[json.dumps(cases)], env=X64, timeout=3600)
    for names, one, many, off in json.loads(text.splitlines()[-1]):
        assert one[0] != one[1] and len(one) == 3
        assert many == pytest.approx(one, rel=1e-10), names
        assert off < 1e-9, names


@pytest.mark.deep
def test_losses_gradients_and_memory_are_those_of_whole_rows(run_python):
    names = [("gated_deltanet", 0), ("gla", 0), ("attention", 0)]
    agree(run_python, [(names, dict(data=2, sequence=4), 44, True)])


COMPOSED = sorted(name for name, config in MIXERS.items() if config.composes)
LAYOUTS = [dict(data=2, sequence=2), dict(data=1, sequence=4), dict(data=1, sequence=8)]


@pytest.mark.long
@pytest.mark.parametrize("name", COMPOSED)
def test_every_composed_mixer_is_exact(run_python, name):
    examples = range(len(MIXERS[name].examples()))
    carries = name != "attention"  # its examples without a window cannot continue a row
    agree(run_python, [([(name, i)], layout, 48, carries) for i in examples for layout in LAYOUTS])


@pytest.mark.long
@pytest.mark.parametrize("name", ["titans", "titans_mac", "infini_attention", "transformer_xl", "hopfield_pooling"])
def test_other_mixers_are_exact_in_turn(run_python, name):
    agree(run_python, [([(name, 0)], layout, 48, True) for layout in LAYOUTS[:2]])


SHAPES = (
    CODE
    + """
names = json.loads(sys.argv[1])
print(json.dumps([collectives(names, dict(data=1, sequence=4), length) for length in (48, 96)]))
"""
)


@pytest.mark.deep
def test_the_exchange_of_states_does_not_grow_with_the_rows(run_python):
    """No collective on q, k or v: every array that devices exchange has the same shape at twice the length."""
    found = run_python(SHAPES, args=[json.dumps([("gated_deltanet", 0), ("gla", 0)])])
    short, long = json.loads(found.splitlines()[-1])
    config = GatedDeltaNetConfig.examples()[0]
    states = f",{config.values[0]},{config.head_dim},{config.head_dim}]"  # the transitions of the delta rule
    assert short == long and any(shape.endswith(states) for shape in short)


def experiment(model=None, seq_len=48, **parallel):
    parallel = ParallelConfig(**{"sequence": 4, **parallel})
    data = MQAR(seq_len=seq_len, num_pairs=2, vocab_size=32, train_examples=64, validation_examples=8)
    model = model or LanguageModelConfig(vocab_size=32, dim=16, mixers=(AttentionConfig(window=8),), repeat=1)
    return tiny(model=model, data=data, parallel=parallel)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (dict(seq_len=46), "data.seq_len=46 does not divide over parallel.sequence=4"),
        (dict(strategy="pmap"), "parallel.strategy='pjit'"),
        (dict(tensor=2), "parallel.tensor=2 cannot be combined"),
        (dict(model="prefix"), "a cut inside the prefix"),
        (dict(model="hmt"), "hmt reads them in order"),
    ],
)
def test_what_cannot_be_split_is_refused(bad, said):
    """By `check`, before anything is compiled, in one sentence that names the field."""
    models = {
        "prefix": LanguageModelConfig(vocab_size=32, mixers=(PrefixLinearAttentionConfig.examples()[0],)),
        "hmt": dataclasses.replace(MODELS["hmt"].examples()[0]),
    }
    fields = bad | ({"model": models[bad["model"]]} if "model" in bad else {})
    with pytest.raises(UserError, match="parallel.sequence") as error:
        check(dataclasses.replace(experiment(**fields), allow_future=True))
    assert said in str(error.value) and "\n" not in str(error.value)
