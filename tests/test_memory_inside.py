"""Memory inside a pretrained model: branches, exchanged mixers, frozen parameters, adapters, a larger vocabulary."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from engrax import cli
from engrax.errors import UserError
from engrax.layers import GatedDeltaNetConfig, GLAConfig, TitansConfig
from engrax.layers.common.lora import LoraConfig
from engrax.models import handover, imported, published
from engrax.models.layer_change import LayerChange
from engrax.tests import pretrained_numpy as oracle
from engrax.tests.experiments import tiny
from engrax.train import AdamWConfig, ConstantConfig, runs, starting
from engrax.train.loop import train
from engrax.train.trainer import Trainer

LLAMA = oracle.LLAMA | {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "tie_word_embeddings": True}
TITANS = TitansConfig(heads=2, head_dim=4, depth=1, chunk_size=8)
BRANCHES = (LayerChange(at=(1, 3), branch=TITANS),)
ADAMW = AdamWConfig(learning_rate=1e-2, schedule=ConstantConfig(warmup_steps=2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama checkpoint of four layers."""
    path = tmp_path_factory.mktemp("published") / "llama"
    oracle.write_checkpoint(path, LLAMA, oracle.random_tensors(LLAMA))
    return path


def changed(folder, **fields):
    return dataclasses.replace(imported.read_config(folder), **fields)


def flat(model):
    return {".".join(map(str, p)): np.asarray(v.get_value()) for p, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}


@jax.jit
def logits(model, tokens, ids):
    return model.logits(model(tokens, segment_ids=ids).hidden)


def rows():
    tokens = np.random.default_rng(0).integers(0, 40, (2, 24)).astype(np.int32)
    ids = np.repeat([[0, 1, -1]], [11, 10, 3], axis=1).astype(np.int32).repeat(2, axis=0)
    return jnp.asarray(tokens), jnp.asarray(ids)


@pytest.mark.parametrize("at, scans", [((1, 3), 1), pytest.param((0,), 2, marks=pytest.mark.deep)])
def test_closed_branches_give_the_backbones_logits_exactly(folder, at, scans):
    config = changed(folder, layers=(LayerChange(at=at, branch=TITANS),))
    assert len(config.stretches) == scans
    tokens, ids = rows()
    with_branches = imported.load(folder, config)
    np.testing.assert_array_equal(logits(with_branches, tokens, ids), logits(imported.load(folder), tokens, ids))
    for block in with_branches.blocks:
        if hasattr(block.mixer, "gate"):
            block.mixer.gate[...] = jnp.full(block.mixer.gate.shape, 0.3)
    assert np.max(np.abs(logits(with_branches, tokens, ids) - logits(imported.load(folder), tokens, ids))) > 1e-3


def test_a_mixer_in_place_of_attention_gets_its_projections(folder):
    """Keys and values of two heads are copied to the four query heads; the rest of the layer stays."""
    linear = GatedDeltaNetConfig(heads=4, head_dim=4, value_dim=4)
    model = imported.load(folder, changed(folder, layers=(LayerChange(at=(2,), mixer=linear),)))
    old, new = flat(imported.load(folder)), flat(model)
    assert [stack.layers for stack in model.config.stacks] == [(0, 1), (2,), (3,)]
    key = old["blocks.0.mixer.k.kernel"][2].reshape(16, 2, 4)
    value = old["blocks.0.mixer.v.kernel"][2].reshape(16, 2, 4)
    wanted = [old["blocks.0.mixer.q.kernel"][2]] + [np.repeat(x, 2, axis=1).reshape(16, 16) for x in (key, value)]
    np.testing.assert_array_equal(new["blocks.1.mixer.qkv.kernel"][0], np.concatenate(wanted, axis=1))
    np.testing.assert_array_equal(new["blocks.1.mixer.out.kernel"][0], old["blocks.0.mixer.out.kernel"][2])
    np.testing.assert_array_equal(new["blocks.1.mlp.up.kernel"][0], old["blocks.0.mlp.up.kernel"][2])
    np.testing.assert_array_equal(new["blocks.2.mixer.q.kernel"], old["blocks.0.mixer.q.kernel"][3:])
    assert {"blocks.1.mixer.decay.bias", "blocks.1.mixer.norm.scale"} <= set(new)


def test_widths_that_do_not_fit_are_refused(folder):
    wide = GLAConfig(heads=4, head_dim=4, value_dim=8)
    with pytest.raises(UserError, match=r"blocks.0.mixer.out.kernel is \[32, 16\], .*choose the same heads"):
        imported.load(folder, changed(folder, layers=(LayerChange(at=(0,), mixer=wide),)))
    with pytest.raises(UserError, match="there is no layer 4; the model has 4"):
        changed(folder, layers=(LayerChange(at=(4,), branch=TITANS),))
    with pytest.raises(UserError, match="layer 1 is changed twice"):
        changed(folder, layers=(*BRANCHES, LayerChange(at=(1,), mixer=wide)))
    with pytest.raises(UserError, match="cannot express"):
        model = imported.load(folder, changed(folder, layers=BRANCHES))
        imported.export(model, folder / "out", like=folder)
    assert "its layers would have to be ()" in published.fit(model.config, published.FORMATS["llama"]).misfits[0]


def test_new_words_begin_as_the_mean_of_the_old_ones(folder):
    old = flat(imported.load(folder))["embedding"]
    new = flat(imported.load(folder, changed(folder, vocab_size=44)))["embedding"]
    np.testing.assert_array_equal(new[:40], old)
    np.testing.assert_allclose(new[40:], np.broadcast_to(old.mean(axis=0), (4, 16)), atol=1e-6)
    with pytest.raises(UserError, match="vocab_size is 40, not 39"):
        imported.load(folder, changed(folder, vocab_size=39))


def experiment(folder, **fields):
    model = changed(folder, layers=BRANCHES, frozen=True)
    return tiny(model=model, init_from=str(folder), optimizer=ADAMW, steps=4, batch_size=2, **fields)


def moments(trainer):
    """Bytes of the optimizer's arrays that are no counters."""
    return sum(x.nbytes for x in jax.tree.leaves(trainer.init_state()["opt_state"]) if x.ndim)


@pytest.mark.deep
def test_branches_train_and_the_backbone_keeps_its_bits(folder, tmp_path, capsys):
    """The run folder travels without the checkpoint; only what trains has moments."""
    settings = experiment(folder)
    trainer = Trainer(settings)
    _, given = starting.find(trainer, epath.Path(tmp_path / "run"))
    told = capsys.readouterr().err
    assert "new parameters" in told and "blocks.1.mixer.branch" in told and "blocks.0" not in told
    before = {".".join(map(str, path)): np.asarray(value) for path, value in given.items()}
    result = train(settings, tmp_path / "run", progress=False)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.finished and losses[-1] != losses[0]
    (tmp_path / "run").rename(tmp_path / "moved")
    after = flat(runs.open_run(tmp_path / "moved").load()[0])
    new = set(after) - set(before)
    assert all(after[name].tobytes() == before[name].tobytes() for name in before)
    assert new == {name for name in after if ".branch." in name or name.endswith("mixer.gate")}
    assert np.any(after["blocks.1.mixer.gate"])
    assert moments(trainer) == 2 * sum(after[name].nbytes for name in new)


@pytest.mark.long
def test_adapters_on_ones_own_run_and_merged(tmp_path):
    """A run starts another with adapters; merged, it computes the same without them."""
    train(tiny(steps=2), tmp_path / "base", progress=False)
    model = dataclasses.replace(tiny().model, lora=LoraConfig(rank=2, targets=("q", "v", "qkv", "down")), frozen=True)
    tuned = tiny(steps=2, model=model, start_from=str(tmp_path / "base"), optimizer=ADAMW)
    train(tuned, tmp_path / "tuned", progress=False)
    assert cli.main(["merge", str(tmp_path / "tuned"), str(tmp_path / "merged")]) == 0
    base, tuned, merged = (runs.open_run(tmp_path / name).load()[0] for name in ("base", "tuned", "merged"))
    assert flat(merged).keys() == flat(base).keys()
    tokens, ids = jnp.asarray(np.arange(24)[None] % 32), jnp.zeros((1, 24), jnp.int32)
    np.testing.assert_allclose(logits(merged, tokens, ids), logits(tuned, tokens, ids), atol=1e-4)
    assert np.max(np.abs(logits(merged, tokens, ids) - logits(base, tokens, ids))) > 1e-3
    assert cli.main(["merge", str(tmp_path / "merged"), str(tmp_path / "again")]) == 2


def test_patterns_of_names_and_roles_freeze():
    names = {}
    for patterns in ((), ("embedding", "norm", "*.mlp.*")):
        trainer = Trainer(tiny(optimizer=AdamWConfig(frozen=patterns)))
        params = nnx.to_flat_state(trainer.abstract_state()["params"])
        names[patterns] = {".".join(map(str, path)) for path, p in params if p.get_metadata().get("frozen")}
        kept = [p.get_value() for path, p in params if ".".join(map(str, path)) not in names[patterns]]
        bytes_held = sum(x.size * 4 for x in jax.tree.leaves(trainer.abstract_state()["opt_state"]) if x.ndim)
        assert bytes_held == 2 * sum(4 * x.size for x in kept)
    _, found = names.values()
    assert "embedding" in found and "blocks.0.mlp.up.kernel" in found and "blocks.1.mixer_norm.scale" in found
    assert "blocks.0.mixer.q.kernel" not in found
    with pytest.raises(UserError, match="optimizer.frozen has 'norms', which is no role"):
        Trainer(tiny(optimizer=AdamWConfig(frozen=("norms",)))).abstract_state()


def test_a_part_is_told_by_its_name():
    every = {("a", "b", "c"), ("a", "b", "d"), ("a", "e")}
    assert list(handover.told({("a", "b", "c"), ("a", "b", "d")}, every)) == ["a.b"]
    assert list(handover.told({("a", "b", "d"), ("a", "e")}, every)) == ["a.b.d", "a.e"]
