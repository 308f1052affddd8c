"""Devices that share heads, hidden channels and vocabulary: the numbers of one device, and what they exchange."""

import json
import math

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from engrax import models
from engrax.errors import UserError
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.tests import layouts
from engrax.tests.experiments import tiny
from engrax.train import ParallelConfig, sharding
from engrax.train.trainer import Trainer

EXCHANGED = """
import json, sys
from engrax.tests.layouts import collectives, compiled, experiment
found = {}
for family in sys.argv[1].split(","):
    e = experiment(family, parallel=dict(data=2, tensor=2), batch_size=4)
    found[family] = collectives(compiled(e))
print(json.dumps(found))
"""
VOCABULARY = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from engrax.models.shares import look_up
from engrax.pallas_kernels.linear_cross_entropy.api import linear_cross_entropy_terms
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rng = np.random.default_rng(0)
table, labels = rng.normal(size=(22, 6)), rng.integers(-1, 22, (4, 5))
table[[3, 14]] = 2 * table[7]  # two devices hold equal logits
labels[0, 0], hidden = 3, rng.normal(size=(4, 5, 6))
hidden[0, 0] = table[3]

def loss(hidden, table):
    nats, correct, total = linear_cross_entropy_terms(hidden, table, labels, soft_cap=9.0, chunk_size=4)
    looked = look_up(table, jnp.maximum(labels, 0))
    return jnp.sum(nats + total**2) + jnp.sum(jnp.sin(looked)), (nats, correct, total, looked)

both = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
wanted = both(hidden, table)
with jax.set_mesh(mesh):
    args = [jax.device_put(x, NamedSharding(mesh, P(axis))) for x, axis in ((hidden, "data"), (table, "tensor"))]
    program = both.lower(*args).compile()
    for a, b in zip(jax.tree.leaves(program(*args)), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
assert wanted[0][1][1][0, 0] and not np.all(wanted[0][1][1])
print("[4,5,22]" in program.as_text(), "[2,5,22]" in program.as_text(), "[22,6]" in program.as_text())
"""


@pytest.mark.parametrize(
    "families",
    [
        "attention",
        pytest.param("linear", marks=pytest.mark.long),
        pytest.param("delta", marks=pytest.mark.long),
        pytest.param("routed", marks=pytest.mark.long),
        pytest.param("test_time", marks=pytest.mark.long),
    ],
)
def test_a_layer_has_one_all_reduce_of_its_output_and_one_of_its_inputs_cotangent(families, run_python):
    """Two a block forward, two backward, one of the embedding and one of the head; all else grows not with T D."""
    found = json.loads(run_python(EXCHANGED, devices=4, args=[families]).splitlines()[-1])
    for family, moved in found.items():
        rows, T, D = 2, layouts.LENGTH, layouts.DIM
        by_token = sorted([kind, shape] for kind, shape in moved if T in shape)
        numbers = [["all-reduce", [rows, T]]] * 3  # of the head: largest logit, sums of exponentials, label's logit
        if family == "linear":  # the norm of all heads, forward and backward
            numbers = numbers + [["all-reduce", [rows, T, 1]]] * 2
        layers = {"test_time": 3}.get(family, 2)  # the memory, the attention that reads it, the MLP
        assert by_token == sorted(numbers + [["all-reduce", [rows, T, D]]] * (2 * layers + 2)), family


def test_a_vocabulary_among_devices(run_python):
    """The loss, its gradients, predictions at equal logits, and the embedding; no device holds all logits or rows."""
    told = run_python(VOCABULARY, devices=4, env={"JAX_ENABLE_X64": "1"})
    assert told.splitlines()[-1] == "False False False"


LAYOUTS = [
    (dict(data=8), {}),
    (dict(data=4, tensor=2, zero=1), {"accumulate": 2}),
    (dict(data=2, fsdp=2, tensor=2, zero=3), {}),
    (dict(fsdp=4, tensor=2, zero=2), {"accumulate": 2}),
    (dict(data=2, tensor=4, zero=2), {}),
    (dict(fsdp=2, tensor=4, zero=3), {"accumulate": 2}),
    (dict(data=2, fsdp=4, zero=2, offload="optimizer"), {"accumulate": 2}),
    (dict(data=1, tensor=4), {}),
]
LOSSES = """
import json, sys
from engrax.tests.layouts import experiment, run
families, wide, cases = json.loads(sys.argv[1])
found = []
for parallel, fields in cases:
    found.append(run(experiment(*families, parallel=parallel, **fields), wide=wide))
print(json.dumps(found))
"""
FEW = [LAYOUTS[i] for i in (2, 3)]


@pytest.mark.parametrize(
    "families, wide, cases",
    [
        pytest.param(["delta"], False, FEW, marks=pytest.mark.deep, id="two"),
        *(
            pytest.param([family], wide, LAYOUTS, marks=pytest.mark.long, id=f"{family} {64 if wide else 32}")
            for family in layouts.FAMILIES
            for wide in (False, True)
        ),
    ],
)
def test_losses_are_those_of_one_device(families, wide, cases, run_python):
    """Three steps, with the bytes that each device holds of every leaf."""
    env = {"JAX_ENABLE_X64": "1"} if wide else {}
    args = [json.dumps([families, wide, [(dict(data=1), {}), *cases]])]
    one, *many = json.loads(run_python(LOSSES, devices=8, args=args, env=env, timeout=1500).splitlines()[-1])
    assert one["losses"][0] != one["losses"][-1]
    for (parallel, _), found in zip(cases, many):
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-10 if wide else 1e-5), parallel
        kinds = set(found["kinds"])
        assert kinds == ({"device", "pinned_host"} if "offload" in parallel else {"device"}), "counters stay"
        sums = {part: [sum(side) for side in zip(*leaves)] for part, leaves in found["held"].items()}
        whole, held = sums["params"]
        shares, batch = parallel.get("tensor", 1), parallel.get("data", 1) * parallel.get("fsdp", 1)
        assert held <= whole / shares * 1.35 / (batch if parallel.get("zero") == 3 else 1), parallel
        whole, held = sums["opt_state"]
        assert held <= whole / shares * 1.35 / (batch if parallel.get("zero") else 1), parallel


def test_what_does_not_divide_is_named_with_what_fits():
    def told(mixer=None, **fields):
        parallel = ParallelConfig(**{"data": 1, "tensor": 4} | fields.pop("parallel", {}))
        model = dict(vocab_size=32, dim=16, mixers=(mixer or MIXERS["attention"](heads=4),), mlp_hidden=16)
        with pytest.raises(UserError) as error:
            Trainer(tiny(model=LanguageModelConfig(**model | fields), parallel=parallel))
        return str(error.value)

    assert "heads=6 of attention does not divide over parallel.tensor=4 devices; choose heads=8" in told(
        MIXERS["attention"](heads=6)
    )
    assert "choose kv_heads=4" in told(MIXERS["attention"](heads=4, kv_heads=2))
    assert "heads=6 of gated_deltanet" in told(MIXERS["mom"](base=MIXERS["gated_deltanet"](heads=6)))
    assert "choose mlp_hidden=20" in told(mlp_hidden=18) and "choose vocab_size=36" in told(vocab_size=34)
    assert "choose parallel.strategy='pjit'" in told(parallel={"strategy": "pmap"})


def held(trainer, shapes, **parallel):
    """{part of the state: its bytes on one of 8 devices}."""
    parallel = ParallelConfig(**parallel)
    mesh = AbstractMesh(parallel.mesh_shape(8), sharding.AXES, axis_types=sharding.AUTO)
    specs = sharding.state_specs(trainer.tx, shapes["params"], parallel, mesh)

    def size(spec, x):
        return 4 * math.prod(jax.sharding.NamedSharding(mesh, spec).shard_shape(x.shape))

    def total(part):
        flat = jax.tree.leaves(specs[part], is_leaf=lambda s: isinstance(s, jax.P))
        return sum(map(size, flat, jax.tree.leaves(shapes[part])))

    return {part: total(part) for part in shapes}


def test_bytes_of_a_device():
    """Of a model whose parameters are nearly all matrices: each axis divides what is its own."""
    e = layouts.experiment("delta", parallel={})
    trainer, model = Trainer(e), nnx.eval_shape(lambda: models.build(e.model, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    shapes = {"params": params, "grads": params, "opt_state": jax.eval_shape(trainer.tx.init, params)}
    whole = held(trainer, shapes, data=8)
    for zero, tensor in ((0, 2), (0, 4), (1, 1), (1, 4), (2, 2), (3, 1), (3, 2), (3, 4)):
        found = held(trainer, shapes, data=-1, fsdp=2, tensor=tensor, zero=zero)
        for part, stage in {"opt_state": 1, "grads": 2, "params": 3}.items():
            wanted = whole[part] / tensor / (8 // tensor if zero >= stage else 1)
            assert wanted <= found[part] <= 1.4 * wanted, (zero, tensor, part)


EVERY = """
import sys, zlib
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jax.sharding import AxisType
from engrax.errors import UserError
from engrax.layers import MIXERS
from engrax.layers.mixer import as_mixer
from engrax.models.parameters import declare_roles
from engrax.models.shares import run_mixer
mesh = jax.make_mesh((1, 1, 2, 1), ("data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 4)
x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 21, 8)))
ids = jnp.asarray([[0] * 7 + [1] * 14, [0] * 18 + [-1] * 3], jnp.int32)
cut, whole = set(), set()
for name, config in sorted(MIXERS.items()):
    for example in config.examples()[: int(sys.argv[1])]:
        try:
            cuts = example.of_heads(2) is not None
        except UserError:
            continue
        (cut if cuts else whole).add(name)
        if not cuts:
            continue
        graphdef, params = nnx.split(declare_roles(as_mixer(example.build(8, rngs=nnx.Rngs(0), num_layers=2))))
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        params = jax.tree.map(lambda p: p.astype(jnp.float64) + 0.3 * rng.normal(size=p.shape), params)

        def call(run):
            def f(params, x):
                mixer = nnx.merge(graphdef, params)
                first = run(mixer, x[:, :11], None, ids[:, :11])
                second = run(mixer, x[:, 11:], first.state, ids[:, 11:])
                total = jnp.sum(jnp.sin(first.y)) + jnp.sum(second.y**2) + jnp.sum(second.aux)
                return total, (first.y, second.y, second.state)
            return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))

        wanted = call(lambda mixer, *args: mixer.forward(*args))(params, x)
        with jax.set_mesh(mesh):
            found = call(run_mixer)(params, x)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9, err_msg=name)
        print(name, flush=True)
print(len(cut), sorted(whole))
"""


@pytest.mark.long
def test_every_mixer_that_can_be_cut_is_the_same_on_shares_of_its_heads(run_python):
    """Reads, gradients and the state, which is given back in the order of one device, in a call that continues one."""
    told = run_python(EVERY, devices=2, args=[9], env={"JAX_ENABLE_X64": "1"}, timeout=1500)
    count, whole = told.splitlines()[-1].split(" ", 1)
    assert int(count) >= 20 and "attention" not in whole and "retnet" in whole
