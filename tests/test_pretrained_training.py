"""Training that starts from a published checkpoint: the run folder alone suffices, frozen parameters keep every bit."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from engrax import cli
from engrax.errors import UserError
from engrax.layers.common.lora import LoraConfig
from engrax.models import imported
from engrax.tests import pretrained_numpy as oracle
from engrax.tests.experiments import tiny
from engrax.train import AdamWConfig, ConstantConfig, runs, train_step
from engrax.train.experiment import CheckpointConfig
from engrax.train.loop import train
from engrax.train.optimizers import base as optimizers


@pytest.fixture
def folder(tmp_path):
    """A tiny Qwen3 checkpoint, a negative zero among its values."""
    tensors = oracle.random_tensors(oracle.CONFIGS["qwen3"])
    tensors["model.norm.weight"][0] = -0.0
    oracle.write_checkpoint(tmp_path / "qwen3", oracle.CONFIGS["qwen3"], tensors)
    return tmp_path / "qwen3"


def experiment(folder, **fields):
    model = dataclasses.replace(imported.read_config(folder), lora=LoraConfig(rank=2, targets=("q", "v")), frozen=True)
    optimizer = AdamWConfig(learning_rate=1e-2, schedule=ConstantConfig(warmup_steps=2))
    return tiny(model=model, init_from=str(folder), optimizer=optimizer, checkpoint=CheckpointConfig(every=2), **fields)


@pytest.mark.deep
def test_a_run_starts_from_the_checkpoint_and_needs_it_no_more(folder, tmp_path):
    before = load_file(folder / "model.safetensors")
    train(experiment(folder, steps=2), tmp_path / "run", progress=False)
    train(experiment(folder, steps=4), tmp_path / "straight", progress=False)
    resumed = experiment(folder, steps=4)
    shutil.rmtree(folder)
    train(resumed, tmp_path / "run", progress=False)
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    straight = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in losses] == [row["loss"] for row in straight]
    assert runs.open_run(tmp_path / "run").load()[1] == 4
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    after = load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {n for n in before if n.endswith(("q_proj.weight", "v_proj.weight"))}


def test_a_folder_that_does_not_fit_is_refused_before_anything_is_written(folder, tmp_path):
    wrong = experiment(folder)
    wrong = dataclasses.replace(wrong, model=dataclasses.replace(wrong.model, repeat=2))
    with pytest.raises(UserError, match="repeat is 3, not 2"):
        train(wrong, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_an_update_keeps_the_bits_of_what_is_frozen():
    """Without a compiler between, adding an update of 0 turns -0 into 0."""
    still, moves = jnp.array([-0.0, 1.0]), jnp.ones(2)
    params = nnx.State({"still": nnx.Param(still, frozen=True, role="bias"), "moves": nnx.Param(moves, role="bias")})
    tx = optimizers.build(AdamWConfig(), 10, params)
    grads = jax.tree.map(jnp.ones_like, params)
    new, _ = train_step.apply_gradient(tx, {"opt_state": tx.init(params)}, params, grads, jnp.float32(1.0), 1.0)
    assert np.asarray(new["still"][...]).tobytes() == np.float32([-0.0, 1.0]).tobytes()
    assert not np.any(np.asarray(new["moves"][...]) == 1.0)


LAYOUTS = """
import dataclasses, json, sys
import jax, numpy as np
from flax import nnx
from engrax.models import imported
from engrax.tests.test_pretrained_training import experiment
from engrax.train import ParallelConfig, starting
from engrax.train.trainer import Trainer
folder, out = sys.argv[1], {}
source = {".".join(map(str, p)): np.asarray(v.get_value())
          for p, v in nnx.to_flat_state(nnx.state(imported.load(folder), nnx.Param))}
for name, parallel in json.loads(sys.argv[2]).items():
    trainer = Trainer(dataclasses.replace(experiment(folder), parallel=ParallelConfig(**parallel)))
    data, state, losses = trainer.loader("train"), trainer.init_state(starting.find(trainer, None)[1]), []
    moments = sum(leaf.size for leaf in jax.tree.leaves(state["opt_state"]) if leaf.ndim)
    loss, batch = trainer.make_loss(), trainer.put(next(trainer.loader("train")))
    grads = nnx.to_flat_state(jax.jit(jax.grad(loss, has_aux=True))(state["params"], batch, None)[0])
    felt = [".".join(map(str, p)) for p, g in grads if np.any(g.get_value())]
    for _ in range(3):
        state, values = trainer.train_step(state, trainer.put(next(data)))
        losses.append(float(values["loss"]))
    after = {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(state["params"])}
    adapters = {n: v for n, v in after.items() if "lora_" in n}
    assert set(after) == {*source, *adapters}
    out[name] = dict(
        losses=losses, moments=moments, felt=[n for n in felt if "lora_" not in n],
        adapters=sum(v.size for v in adapters.values()),
        changed=[n for n in source if after[n].tobytes() != source[n].tobytes()],
        still=[n for n, v in adapters.items() if n.endswith("lora_b") and not v.any()])
print(json.dumps(out))
"""


@pytest.mark.long
def test_every_layout_leaves_frozen_parameters_alone(folder, run_python):
    layouts = {
        "pjit": {},
        "pmap zero1": {"strategy": "pmap", "zero": 1},
        "pmap zero3": {"strategy": "pmap", "zero": 3},
    }
    found = json.loads(run_python(LAYOUTS, devices=2, args=(folder, json.dumps(layouts))))
    for name, run in found.items():
        assert run["changed"] == [] and run["still"] == [] and run["felt"] == [], name
        assert run["moments"] == 2 * run["adapters"], name
        np.testing.assert_allclose(run["losses"], found["pjit"]["losses"], rtol=1e-5, err_msg=name)
        assert run["losses"][0] != run["losses"][-1]
