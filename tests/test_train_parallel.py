"""Every layout of the training step computes the same numbers and shards what it says it shards."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import dataclasses, json, sys
import jax, numpy as np
from jax.sharding import PartitionSpec
from engrax.tests.experiments import small
from engrax.train import ParallelConfig
from engrax.train.trainer import Trainer

def run(parallel, steps=6, accumulate=1, **fields):
    e = small(parallel=parallel, **fields)
    e = dataclasses.replace(e, optimizer=dataclasses.replace(e.optimizer, accumulate=accumulate))
    trainer, losses = Trainer(e), []
    data, state = trainer.loader("train"), trainer.init_state()
    sizes = {}
    for part in ("params", "opt_state"):
        for leaf in jax.tree.leaves(state[part]):
            shards = any(n % jax.device_count() == 0 and n for n in leaf.shape)
            sizes.setdefault(part, []).append([leaf.nbytes, leaf.addressable_shards[0].data.nbytes, shards])
    compiled = trainer.train_step.lower(state, trainer.put(next(trainer.loader("train")))).compile().as_text()
    for _ in range(steps):
        state, values = trainer.train_step(state, trainer.put(next(data)))
        losses.append(float(values["loss"]))
    after = [leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state["opt_state"])]
    assert after == [s[1] for s in sizes["opt_state"]], "a step changed where the optimizer state lives"
    names = ("all-reduce", "all-gather", "reduce-scatter")
    collectives = {n: compiled.count(n + "(") + compiled.count(n + "-start(") for n in names}
    return dict(losses=losses, sizes=sizes, collectives=collectives)
"""

RUNS = """
out = {}
for name, kwargs in json.loads(sys.argv[1]).items():
    accumulate = kwargs.pop("accumulate", 1)
    out[name] = run(ParallelConfig(**kwargs), accumulate=accumulate)
print(json.dumps(out))
"""

LAYOUTS = {
    f"{strategy} {layout} zero{zero}": dict(strategy=strategy, zero=zero, **mesh)
    for strategy in ("pjit", "pmap")
    for layout, mesh, zero in (
        ("data", dict(data=8), 0),
        ("data", dict(data=8), 1),
        ("data x fsdp", dict(data=2, fsdp=4), 3),
    )
} | {"pmap accumulated": dict(strategy="pmap", data=8, accumulate=2), "pjit accumulated": dict(data=8, accumulate=2)}
# Each costs a program of its own: both strategies, all axes and a stage of each are quick; `make test-long` runs every
# combination.
FAST = ("pjit data x fsdp zero3", "pmap data zero1")
DEEP = ("pjit data zero0", "pmap data x fsdp zero3")


def tier(name):
    return "fast" if name in FAST else "deep" if name in DEEP else "long"


def each(names):
    marks = {"fast": (), "deep": pytest.mark.deep, "long": pytest.mark.long}
    return [pytest.param(name, marks=marks[tier(name)]) for name in names]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory, once):
    """Returns a function of a layout's name: its results on 8 devices; "one": those of one device."""

    def run(wanted, devices):
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
        done = subprocess.run(
            [sys.executable, "-c", CODE + RUNS, json.dumps(wanted)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            cwd=tmp_path_factory.mktemp("layouts"),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def results(name):
        if name == "one":
            return once("one device", lambda: run({"one": {}}, 1))["one"]
        same = [other for other in LAYOUTS if tier(other) == tier(name)]
        return once(f"{tier(name)} layouts", lambda: run({n: LAYOUTS[n] for n in same}, 8))[name]

    return results


@pytest.mark.parametrize("name", each(LAYOUTS))
def test_losses_agree_with_one_device(layouts, name):
    assert len(layouts(name)["losses"]) >= 5
    assert layouts(name)["losses"] == pytest.approx(layouts("one")["losses"], rel=1e-5)
    assert layouts("one")["losses"][-1] != layouts("one")["losses"][0]


@pytest.mark.parametrize("name", each(LAYOUTS))
def test_bytes_per_device_leaf_by_leaf(layouts, name):
    zero = LAYOUTS[name].get("zero", 0)
    for part, stage in (("opt_state", 1), ("params", 3)):
        assert any(shards for _, _, shards in layouts(name)["sizes"][part])
        for total, mine, shards in layouts(name)["sizes"][part]:
            assert mine == (total // 8 if zero >= stage and shards else total)


@pytest.mark.parametrize("name", each(name for name in LAYOUTS if name.startswith("pmap")))
def test_the_pmap_program_shows_its_collectives(layouts, name):
    found = layouts(name)["collectives"]
    assert found["all-reduce"] > 0
    sharded = LAYOUTS[name].get("zero", 0) >= 1
    assert (found["reduce-scatter"] > 0) == sharded and (found["all-gather"] > 0) == sharded


OTHERS = """
from engrax.train import ConstantConfig, LionConfig, SGDConfig
out = {}
for optimizer in (LionConfig(schedule=ConstantConfig(warmup_steps=0)), SGDConfig(momentum=0.5, nesterov=True)):
    for strategy, zero in (("pjit", 0), ("pmap", 1)):
        found = run(ParallelConfig(strategy=strategy, zero=zero), steps=3, optimizer=optimizer)
        out[f"{optimizer.registered_name} {zero}"] = found
print(json.dumps(out))
"""


@pytest.mark.long
def test_other_optimizers_shard_their_state(run_python):
    """ZeRO 1 on two devices: the same losses as replicated, and half of every moment on each device."""
    found = json.loads(run_python(CODE + OTHERS, devices=2).splitlines()[-1])
    for name in ("lion", "sgd"):
        whole, halves = found[f"{name} 0"], found[f"{name} 1"]
        assert halves["losses"] == pytest.approx(whole["losses"], rel=1e-5)
        assert whole["losses"][-1] < whole["losses"][0]
        assert any(shards for _, _, shards in halves["sizes"]["opt_state"])
        for total, mine, shards in halves["sizes"]["opt_state"]:
            assert mine == (total // 2 if shards else total)


REAL_PMAP = """
import functools, jax.numpy as jnp, optax
from flax import nnx
from engrax.train import train_step
e = small()
trainer = Trainer(e)
loss = trainer.make_loss()
params = nnx.state(e.model.build(rngs=nnx.Rngs(e.seed)), nnx.Param)
tx = trainer.tx
state = jax.device_put({"params": params, "opt_state": tx.init(params)}, jax.devices()[0])
state = jax.tree.map(lambda x: np.broadcast_to(np.asarray(x), (8, *x.shape)), state)

@functools.partial(jax.pmap, axis_name="i")
def step(state, batch):
    count = jax.lax.psum(train_step.labelled(batch), "i")
    value, grads = jax.value_and_grad(lambda p: loss(p, batch, None)[0] / count)(state["params"])
    value, grads = jax.lax.psum((value, grads), "i")
    norm = optax.tree.norm(grads)
    new, opt_state = train_step.apply_gradient(tx, state, state["params"], grads, norm, e.optimizer.clip_norm)
    return {"params": new, "opt_state": opt_state}, value

data, losses = trainer.loader("train"), []
for _ in range(6):
    batch = {k: v.reshape(8, 2, -1) for k, v in next(data).items()}
    state, value = step(state, batch)
    losses.append(float(value[0]))
print(json.dumps(losses))
"""


@pytest.mark.deep
def test_the_real_pmap_gives_the_same_losses(layouts, run_python, root):
    output = run_python(CODE + REAL_PMAP, devices=8)
    assert json.loads(output.splitlines()[-1]) == pytest.approx(layouts("one")["losses"], rel=1e-5)
