"""What optimizers keep: bytes by the published formulae, on one device and sharded, and exact resumption."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

import engrax
from engrax.tests.experiments import small
from engrax.tests.optimizer_cases import PARAMS, PLAIN, SHAPES, SMALL, STEPS
from engrax.train import (
    OPTIMIZERS,
    SCHEDULES,
    AdamWConfig,
    CheckpointConfig,
    ConstantConfig,
    FRUGALConfig,
    GaLoreConfig,
    LionConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    ParallelConfig,
    ScheduleFreeConfig,
    SPAMConfig,
    cost,
    starting,
)
from engrax.train.checkpoint import Checkpoints
from engrax.train.loop import train
from engrax.train.optimizers.base import build
from engrax.train.trainer import Trainer


def state_bytes(config, params=PARAMS):
    """(bytes of arrays, of counters and other scalars)."""
    leaves = jax.tree.leaves(jax.eval_shape(build(config, 1, params).init, params))
    sizes = [[math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves if bool(x.ndim) == big] for big in (1, 0)]
    return tuple(map(sum, sizes))


def formulae(n):
    """Bytes of every optimizer's arrays for PARAMS, by the published formulae: sums over single matrices [i, o]."""
    matrix = [shape for _, shape, role, _ in SHAPES.values() if role == "matrix" and shape != (4, 2, 3)]
    total = sum(math.prod(shape) for _, shape, _, _ in SHAPES.values())
    inside = sum(map(math.prod, matrix))
    rest, stack = total - inside, [(math.prod(s[:-2]), *s[-2:]) for s in matrix]
    low = sum(b * (2 * min(i, o) + 2 * 2 * max(i, o)) for b, i, o in stack)  # rank min + 2 rank max, rank 2
    return {
        "adamw": 8 * total,
        "lion": 4 * total,
        "sgd": 4 * total,
        "spam": 8 * total,
        "schedule_free": 8 * total,
        "muon": 4 * inside + 8 * rest + 12,  # and the three coefficients of Newton-Schulz
        "galore": 4 * low + 8 * rest,
        "natural_galore": 4 * (low + sum(b * 4 * 2 * max(i, o) for b, i, o in stack)) + 8 * rest,
        "frugal": 8 * sum(b * int(0.5 * i) * o for b, i, o in stack) + 8 * rest,
        # Factored along two axes of at least 4; "memories" has [3, 4, 5], "qkv" [4, 14], "table" [7, 4].
        "adafactor": 4 * (2 * (6 + 10) + 2 * (9 + 5) + (4 + 14) + 3 * (4 + 5) + (7 + 4) + 24 + 24 + 10),
    }[n]


@pytest.mark.parametrize("name", SMALL)
def test_state_bytes_are_the_published_formula(name):
    arrays, scalars = state_bytes(SMALL[name])
    assert arrays == formulae(name) and scalars <= 24


def test_every_optimizer_has_its_formula():
    assert set(SMALL) == set(OPTIMIZERS)


def test_eight_bit_state_bytes():
    """1 + 12 / 128 per entry for each moment."""
    params = nnx.State({"w": nnx.Param(jnp.zeros((3, 100, 7)), axes=("layers", "embed", "mlp"), role="matrix"),
                        "b": nnx.Param(jnp.zeros((3, 127)), axes=("layers", "mlp"), role="bias")})  # fmt: skip
    for config, moments in ((AdamWConfig(moments="float8"), 2), (LionConfig(moments="float8"), 1)):
        arrays, _ = state_bytes(config, params)
        assert arrays == moments * (3 * (700 + 12 * 6) + 4 * 3 * 127)


EIGHT_BIT = {f"{n} in 8 bits": dataclasses.replace(SMALL[n], moments="float8") for n in ("adamw", "galore", "muon")}
EVERY = {name: SMALL.get(name) or OPTIMIZERS[name](**PLAIN) for name in OPTIMIZERS}  # new ones too


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "galore" else pytest.mark.deep) for n in (*EVERY, *EIGHT_BIT)]
)
def test_a_saved_state_goes_on_to_the_bit(name, tmp_path):
    """Through a checkpoint after 5 of 8 steps, in the middle of every interval."""
    config = (EVERY | EIGHT_BIT)[name]
    params = jax.tree.map(lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (6,)), PARAMS) if name in EIGHT_BIT else PARAMS
    grads = [jax.tree.map(lambda p, i=i: jnp.sin(p * (i + 1)), params) for i in range(STEPS)]
    if name in EIGHT_BIT:
        params, grads = (jax.tree.map(lambda x: x, t) for t in (params, grads))
        for tree in (params, *grads):
            tree["qkv"].set_metadata(widths=(24, 24, 36))
    tx = build(config, STEPS, params)
    update = jax.jit(tx.update)
    start, ends = {"params": params, "opt_state": tx.init(params)}, []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())

    def go(state, grads):
        for g in grads:
            updates, opt_state = update(g, state["opt_state"], state["params"])
            state = {"params": jax.tree.map(jnp.add, state["params"], updates), "opt_state": opt_state}
        return state

    half = go(start, grads[:5])
    checkpoints.save(5, half, {}, None)
    ends.append(go(half, grads[5:]))
    checkpoints.wait()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), half)
    ends.append(go(checkpoints.restore(like, 5)[0], grads[5:]))
    checkpoints.close()
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert any((np.asarray(a) != np.asarray(b)).any() for a, b in zip(*map(jax.tree.leaves, (half, ends[0]))))


ZERO = """
import dataclasses, json, math, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from engrax.tests.optimizer_cases import SMALL
from engrax.train import ParallelConfig, sharding
from engrax.train.optimizers.base import build, is_variable
from engrax.models.parameters import LAYERS, axes_of

SHAPES = {
    "up": ((LAYERS, "embed", "mlp"), (3, 16, 64), "matrix"), "down": ((LAYERS, "mlp", "embed"), (3, 64, 16), "matrix"),
    "table": (("vocab", "embed"), (32, 32), "embedding"), "norm": ((LAYERS, "norm"), (8, 12), "norm"),
}

def draw(seed):
    def one(axes, shape, role):
        return nnx.Param(jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32), axes=axes, role=role)
    return nnx.State({name: one(*shape) for name, shape in SHAPES.items()})

params, grads = draw(0), [draw(1), draw(2)]
found = {}
for name in sys.argv[1].split(","):
    config = SMALL[name.split()[0]]
    config = dataclasses.replace(config, moments="float8") if "8 bits" in name else config
    tx, parallel = build(config, 2, params), ParallelConfig(data=2, fsdp=4, zero=1)
    mesh = sharding.make_mesh(parallel, 8)
    specs = sharding.state_specs(tx, params, parallel, mesh)
    places, whole = sharding.named(specs["opt_state"], mesh), sharding.named(specs["params"], mesh)
    state = jax.jit(tx.init, out_shardings=places)(params)
    update = jax.jit(tx.update, in_shardings=(whole, places, whole), out_shardings=(whole, places))
    plain, alone = tx.init(params), jax.jit(tx.update)
    for g in grads:
        moved, state = update(g, state, params)
        wanted, plain = alone(g, plain, params)
    error = max(float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (moved, wanted))))
    leaves = []
    for path, v in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_variable)[0]:
        if is_variable(v) and jax.tree.leaves(v):
            x, stacked = v.get_value(), axes_of(v)[:1] == (LAYERS,)
            splits = any(n % 8 == 0 and n for n in x.shape[stacked:])
            leaves.append([jax.tree_util.keystr(path), x.nbytes, x.addressable_shards[0].data.nbytes, splits])
        elif not is_variable(v):
            assert v.size <= 3, path
    found[name] = {"error": error, "leaves": leaves}
print(json.dumps(found))
"""
SHARDED = (*SMALL, "adamw in 8 bits", "galore in 8 bits")


@pytest.mark.deep
def test_zero_shards_every_state(run_python):
    """Eight devices: an array with a divisible axis, stacked layers aside, takes an eighth; the update is the same."""
    found = json.loads(run_python(ZERO, args=[",".join(SHARDED)], devices=8).splitlines()[-1])
    for name in SHARDED:
        assert found[name]["error"] < 1e-4, name
        for path, total, mine, splits in found[name]["leaves"]:
            assert mine == (total // 8 if splits else total), (name, path)
    for name, part in (
        ("galore", "projector"),
        ("natural_galore", "past"),
        ("adamw in 8 bits", "codes"),
        ("adamw in 8 bits", "scale"),
        ("adafactor", "v_row"),
        ("muon", "mu"),
        ("frugal", "nu"),
        ("schedule_free", "z"),
    ):
        assert [leaf for leaf in found[name]["leaves"] if part in leaf[0] and leaf[3]], (name, part)


@pytest.mark.deep
def test_the_average_of_schedule_free_is_evaluated(tmp_path):
    """Validation, `engrax.load` and a second stage use x = (y - (1 - b1) z) / b1 of the saved y and z."""
    optimizer = ScheduleFreeConfig(learning_rate=1e-2, schedule=ConstantConfig(warmup_steps=2))
    experiment = small(optimizer=optimizer, steps=6, checkpoint=CheckpointConfig(every=0))
    metrics = train(experiment, tmp_path / "run", progress=False).metrics
    trainer, checkpoints = Trainer(experiment), Checkpoints(tmp_path / "run")
    state, _ = checkpoints.restore(trainer.abstract_state(), 6)
    checkpoints.close()
    model, _ = engrax.load(tmp_path / "run")
    loaded = nnx.state(model, nnx.Param)
    y, z, x = (np.asarray(tree["embedding"][...]) for tree in (state["params"], state["opt_state"].z, loaded))
    np.testing.assert_allclose(x, (y - 0.1 * z) / 0.9, rtol=1e-5)
    assert np.abs(x - y).max() > 1e-4
    found = trainer.validate(loaded, experiment.eval.batches)["validation_loss"]
    assert found == pytest.approx(metrics["validation_loss"], rel=1e-6)
    assert found != pytest.approx(
        trainer.validate(state["params"], experiment.eval.batches)["validation_loss"], rel=1e-5
    )
    second = dataclasses.replace(experiment, start_from=str(tmp_path / "run"), optimizer=AdamWConfig())
    _, started = starting.find(Trainer(second), epath.Path(tmp_path / "other"))
    np.testing.assert_array_equal(np.asarray(started[("embedding",)]), x)


SHORT = {  # optimizers whose intervals end within six steps, and 8-bit moments
    "frugal": FRUGALConfig(gap=3),
    "galore": GaLoreConfig(rank=4, gap=3),
    "muon": MuonConfig(moments="float8"),
    "natural_galore": NaturalGaLoreConfig(rank=4, gap=3, history=4),
    "spam": SPAMConfig(gap=4, warmup=2, settle=2, rates=(("embedding", 0.5),)),
}
TRAINED = {name: SHORT.get(name) or OPTIMIZERS[name]() for name in OPTIMIZERS} | {
    f"adamw, {name}": AdamWConfig(schedule=SCHEDULES[name](warmup_steps=2)) for name in SCHEDULES
}


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_a_stopped_training_goes_on_to_the_bit(name, tmp_path, monkeypatch):
    """Every registered optimizer and schedule, in whole trainings."""
    experiment = small(optimizer=TRAINED[name], steps=6, checkpoint=CheckpointConfig(every=0))
    whole = train(experiment, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("engrax.train.distributed.StopSignal.reached", lambda self, step: step == 4)
        assert train(experiment, tmp_path / "cut", progress=False).step == 4
    assert train(experiment, tmp_path / "cut", progress=False).metrics["loss"] == whole.metrics["loss"]
    ends = []
    for folder in ("whole", "cut"):
        checkpoints = Checkpoints(tmp_path / folder)
        ends.append(checkpoints.restore(Trainer(experiment).abstract_state(), 6)[0])
        checkpoints.close()
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_describe_counts_the_bytes_of_every_optimizer(name):
    experiment = small(optimizer=OPTIMIZERS[name](), parallel=ParallelConfig(zero=1))
    params = nnx.state(nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(0))), nnx.Param)
    found = cost.costs(experiment, 8)["memory_per_device"]
    assert found["optimizer_bytes_unsharded"] == sum(state_bytes(experiment.optimizer, params))
    assert found["optimizer_bytes"] < 0.2 * found["optimizer_bytes_unsharded"]
