"""Evaluation on several devices: sharded parameters and rows, the numbers of one device."""

import json

import numpy as np
import pytest

from engrax.data import TextFolder
from engrax.evals import evaluate
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig
from engrax.train import CheckpointConfig, EvalConfig, Experiment, ParallelConfig
from engrax.train.loop import train

ONLY = ["validation", "memory_ablation", "diagnostics", "stream"]
CODE = """
import json, sys
import jax
from flax import nnx
from engrax.evals import evaluate, scoring
from engrax.evals.context import Context
sizes = []
init = Context.__init__
def watched(self, run, model, step, **settings):
    init(self, run, model, step, **settings)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        shards = {shard.device.id: shard.data.nbytes for shard in leaf.addressable_shards}
        sizes.append([leaf.nbytes, any(n and n % 4 == 0 for n in leaf.shape), sorted(shards.values())])
Context.__init__ = watched
results = evaluate(sys.argv[1], only=json.loads(sys.argv[2]), stream=1024, progress=False)
print(json.dumps({"sizes": sizes, "folder": str(results.directory), "devices": results.data["devices"]}))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run under ZeRO 3 whose validation rows, 9, and documents, 2, do not divide over 4 devices."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for i, length in enumerate((1100, 1200, 900, 2600)):
        (folder / f"{i}.txt").write_bytes(bytes(rng.integers(97, 103, length).astype(np.uint8)))
    mixer = LinearAttentionConfig(heads=2, head_dim=4, value_dim=4, chunk_size=8, conv_width=1)
    experiment = Experiment(
        model=LanguageModelConfig(vocab_size=256, dim=8, mixers=(mixer,), repeat=2, mlp_hidden=16),
        data=TextFolder(path=str(folder), seq_len=64, validation_fraction=0.45),
        steps=2,
        batch_size=4,
        compute_dtype="float32",
        parallel=ParallelConfig(zero=3),
        eval=EvalConfig(every=0, batches=1),
        checkpoint=CheckpointConfig(every=0),
    )
    train(experiment, folder / "run", progress=False)
    return folder / "run"


def numbers(value, name=""):
    """The numbers of a tree by their dotted names, times left out."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in numbers(item, f"{name}.{key}").items()}
    timed = ".time." in name or name.endswith("tokens_per_second")
    return {name: value} if isinstance(value, (int, float)) and not timed else {}


@pytest.mark.deep
def test_four_devices_give_the_numbers_of_one(run, run_python):
    one = evaluate(run, only=ONLY, stream=1024, progress=False)
    found = json.loads(run_python(CODE, devices=4, args=[run, json.dumps(ONLY)]).splitlines()[-1])
    assert found["devices"] == 4 and one.data["devices"] == 1
    assert sum(divides for _, divides, _ in found["sizes"]) >= 8
    for total, divides, parts in found["sizes"]:
        assert parts == [total // 4 if divides else total] * 4, "each device holds a quarter, where an axis divides"
    assert found["folder"] == str(one.directory.parent / "step_2-2"), "nothing is overwritten"
    four = json.loads((run / "evals" / "step_2-2" / "results.json").read_text())["evaluations"]
    wanted, got = numbers(one.evaluations), numbers(four)
    assert len(wanted) > 100 and got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
