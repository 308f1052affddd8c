"""The parts of training, each by itself: config, schedule, optimizer, loss, metrics, checkpoints, compile time."""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MIXERS, LinearAttentionConfig, MoMConfig
from engrax.models import LanguageModelConfig
from engrax.tests.experiments import small, tiny
from engrax.train import (
    AdamWConfig,
    CheckpointConfig,
    CosineConfig,
    LionConfig,
    LogConfig,
    SGDConfig,
    host,
    metrics,
    train_step,
)
from engrax.train import experiment as experiments
from engrax.train.checkpoint import Checkpoints, flatten, unflatten
from engrax.train.loop import train
from engrax.train.optimizers import base as optimizers
from engrax.train.trainer import Trainer


@pytest.mark.smoke
def test_an_experiment_travels_as_json():
    experiment = tiny(steps=7)
    text = experiments.to_json(experiment)
    assert experiments.from_json(text) == experiment
    assert json.loads(text)["experiment"]["model"]["mixers"][1]["type"] == "mixer:titans"


def test_differences_name_the_fields():
    old = experiments.to_dict(tiny())
    new = experiments.to_dict(experiments.replace(tiny(), {"model.mixers.1.heads": 4, "optimizer.b1": 0.5}))
    assert experiments.differences(old, new) == ["model.mixers.1.heads", "optimizer.b1"]
    assert experiments.differences(old, old) == []


def test_replace_refuses_unknown_fields():
    with pytest.raises(UserError, match="optimizer.learning_rte is no field; did you mean 'learning_rate'"):
        experiments.replace(tiny(), {"optimizer.learning_rte": 1.0})
    with pytest.raises(UserError, match="no element"):
        experiments.replace(tiny(), {"model.mixers.5.heads": 1})


RATE = dict(learning_rate=1e-2, schedule=CosineConfig(warmup_steps=2))


@pytest.mark.parametrize(
    "config, peer",
    [
        (AdamWConfig(**RATE, b2=0.9), lambda rate, **kw: optax.adamw(rate, b2=0.9, weight_decay=0.1, **kw)),
        (LionConfig(**RATE, weight_decay=0.3), lambda rate, **kw: optax.lion(rate, weight_decay=0.3, **kw)),
        (SGDConfig(**RATE, nesterov=True), lambda rate, **_: optax.sgd(rate, momentum=0.9, nesterov=True)),
        (SGDConfig(**RATE, momentum=0.0), lambda rate, **_: optax.sgd(rate)),
    ],
)
def test_optimizers_are_optax_own(config, peer):
    """To the bit, after five steps on a matrix that decays and a bias that does not."""
    arrays = {"x": (("embed", "mlp"), (3, 4), "matrix"), "bias": ((None,), (4,), "bias")}
    params = nnx.State(
        {
            n: nnx.Param(jnp.asarray(np.random.randn(*size), jnp.float32), axes=axes, role=role)
            for n, (axes, size, role) in arrays.items()
        }
    )
    found = []
    for tx in (optimizers.build(config, 5, params), peer(config.rate(5), mask=optimizers.decay_mask(params))):
        x, state = params, tx.init(params)
        for _ in range(5):
            updates, state = tx.update(jax.tree.map(jnp.sin, x), state, x)
            x = optax.apply_updates(x, updates)
        found.append(jax.tree.leaves(x))
    for own, other in zip(*found):
        np.testing.assert_array_equal(own, other)


def test_weight_decay_touches_matrices_only():
    params = nnx.state(tiny().model.build(rngs=nnx.Rngs(0)), nnx.Param)
    mask = nnx.to_pure_dict(optimizers.decay_mask(params))
    block = mask["blocks"][1]
    assert mask["embedding"] and block["mixer"]["qkv"]["kernel"] and block["mlp"]["up"]["kernel"]
    assert not block["mixer"]["gate_bias"] and not block["mixer"]["conv"]["kernel"] and not block["mixer_norm"]["scale"]
    assert not block["mixer"]["initial"][0] and not mask["norm"]["scale"]


def test_clipping_bounds_the_update_by_the_global_norm():
    grads, params = {"a": jnp.full(4, 3.0), "b": jnp.full(9, 4.0)}, {"a": jnp.zeros(4), "b": jnp.zeros(9)}
    tx = optax.sgd(1.0)
    norm = optax.tree.norm(grads)
    new, _ = train_step.apply_gradient(tx, {"opt_state": tx.init(params)}, params, grads, norm, 0.5)
    assert float(optax.tree.norm(new)) == pytest.approx(0.5, rel=1e-6)
    new, _ = train_step.apply_gradient(tx, {"opt_state": tx.init(params)}, params, grads, norm, 0.0)
    assert float(optax.tree.norm(new)) == pytest.approx(float(norm), rel=1e-6)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 8 steps that saved at 4 and 8 and validated at 4 and 8."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    experiment = small(checkpoint=CheckpointConfig(every=4), log=LogConfig(every=1, wandb="offline", tensorboard=True))
    experiment = experiments.replace(experiment, {"eval.every": 4})
    return train(experiment, run_dir, progress=False), experiment


def test_a_run_folder_holds_what_it_should(finished):
    result, experiment = finished
    assert result.finished and result.step == 8
    found = {path.name for path in result.run_dir.iterdir()}
    assert {
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "tensorboard",
        "wandb",
        "wandb_id.txt",
    } <= found
    environment = json.loads((result.run_dir / "environment.json").read_text())
    assert environment["data_digest"] == experiment.data.digest() and environment["versions"]["jax"] == jax.__version__
    rows = metrics.read(result.run_dir)
    assert [row["step"] for row in rows] == list(range(1, 9)) and all("loss" in row for row in rows)
    assert "validation_loss" in rows[3] and "memory/titans.lr_mean/0" in rows[7] and "learning_rate" in rows[0]
    assert any(path.name.startswith("events") for path in (result.run_dir / "tensorboard").iterdir())


def test_a_finished_run_is_left_alone(finished):
    result, experiment = finished
    before = (result.run_dir / "metrics.jsonl").read_text()
    again = train(experiment, result.run_dir, progress=False)
    assert again.finished and again.step == 8
    assert (result.run_dir / "metrics.jsonl").read_text() == before


def test_newest_best_and_numbered_checkpoints(finished):
    import engrax

    result, _ = finished
    rows = {row["step"]: row for row in metrics.read(result.run_dir)}
    best = min((4, 8), key=lambda step: rows[step]["validation_loss"])
    assert [engrax.load(result.run_dir, step)[1] for step in (None, "best", 4, "4")] == [8, best, 4, 4]
    with pytest.raises(UserError, match="no checkpoint of step 5 .there are: 4, 8"):
        engrax.load(result.run_dir, 5)
    one, two = (nnx.state(engrax.load(result.run_dir, step)[0], nnx.Param) for step in (4, 8))
    assert not np.array_equal(*(np.asarray(jax.tree.leaves(p)[0]) for p in (one, two)))


def test_a_checkpoint_of_another_shape_names_the_parameter(finished):
    result, experiment = finished
    wider = Trainer(experiments.replace(experiment, {"model.mlp_hidden": 32}))
    with pytest.raises(
        UserError, match=r"holds params.blocks.0.mlp.down.kernel as float32\[1, 16, 16\].*wants float32\[1, 32, 16\]"
    ):
        Checkpoints(result.run_dir).restore(wider.abstract_state(), 8)


def test_a_damaged_checkpoint_is_put_aside_and_the_run_ends_the_same(finished, tmp_path, capsys):
    import shutil

    result, experiment = finished
    run_dir = tmp_path / "run"
    shutil.copytree(result.run_dir, run_dir)
    largest = max((run_dir / "checkpoints" / "8" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    assert train(experiment, run_dir, progress=False).finished
    told = capsys.readouterr().err
    assert told.count("is damaged") == 1 and f"{largest.name} differs from its digest" in told and "step 4" in told
    assert {path.name for path in (run_dir / "checkpoints").iterdir()} == {"4", "8", "8.damaged"}
    like = Trainer(experiment).abstract_state()
    a, b = (Checkpoints(folder).restore(like, 8)[0] for folder in (result.run_dir, run_dir))
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)


def test_reading_a_run_leaves_a_save_under_way_alone(finished):
    import engrax

    result, _ = finished
    pending = result.run_dir / "checkpoints" / "9.orbax-checkpoint-tmp"
    pending.mkdir()
    engrax.load(result.run_dir)
    assert pending.exists()
    pending.rmdir()


def test_metrics_are_cut_to_the_restored_step(tmp_path):
    from etils import epath

    path = epath.Path(tmp_path) / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "loss": 1.2}\n{"step": 4, "lo')
    metrics.cut_after(path, 2)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    assert path.read_text().endswith("\n")


def test_one_wandb_id_across_resumes(tmp_path, monkeypatch):
    import wandb
    from etils import epath

    ids = []
    monkeypatch.setattr(
        wandb, "init", lambda **settings: ids.append((settings["id"], settings["resume"], settings["mode"]))
    )
    for _ in range(2):
        metrics.MetricsWriter(epath.Path(tmp_path), LogConfig(wandb="online"), resumed_at=0, settings={})
    assert ids[0] == ids[1] and ids[0][1:] == ("allow", "online") and len(ids[0][0]) >= 8


def test_numbers_that_json_cannot_carry(tmp_path):
    from etils import epath

    writer = metrics.MetricsWriter(epath.Path(tmp_path), LogConfig(), resumed_at=0, settings={})
    writer.write(1, {"loss": math.nan, "norm": np.float32(2.0)})
    assert metrics.read(tmp_path) == [{"step": 1, "loss": "nan", "norm": 2.0}]


def test_the_program_does_not_grow_with_depth():
    def size(repeat):
        experiment = experiments.replace(small(), {"model.repeat": repeat})
        trainer = Trainer(experiment)
        batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), next(trainer.loader("train")))
        return len(trainer.train_step.lower(trainer.abstract_state(), batch).as_text().splitlines())

    assert size(12) == size(2)


@pytest.mark.deep
def test_bfloat16_compute_keeps_parameters_in_float32():
    trainer = Trainer(small(compute_dtype="bfloat16"))
    state = trainer.init_state()
    data = trainer.loader("train")
    for _ in range(2):
        state, values = trainer.train_step(state, trainer.put(next(data)))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(state["params"]))
    assert np.isfinite(float(values["loss"]))


def test_run_folders_in_buckets_stay_there(tmp_path, monkeypatch):
    from engrax.train import runs

    monkeypatch.chdir(tmp_path)
    assert str(runs.folder("gs://bucket/run")) == "gs://bucket/run"
    assert str(runs.folder("run")) == str(tmp_path / "run")


def test_no_checkpoint_of_a_step_that_is_not_finite(tmp_path):
    experiment = experiments.replace(
        small(), {"optimizer.learning_rate": 1e30, "optimizer.clip_norm": 0.0, "steps": 20, "checkpoint.every": 1}
    )
    with pytest.raises(UserError, match="the loss or the gradient of step"):
        train(experiment, tmp_path / "run", progress=False)
    sound = Checkpoints(tmp_path / "run").steps()
    rows = metrics.read(tmp_path / "run")
    assert sound and sound[-1] <= rows[-1]["step"] and all(math.isfinite(row["loss"]) for row in rows)


def test_a_config_of_an_unregistered_class_is_refused_before_training():
    @dataclasses.dataclass(frozen=True)
    class Mine(type(small().model)):
        """A model that nobody registered."""

    model = small().model
    mine = Mine(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)})
    with pytest.raises(UserError, match="Mine is not registered"):
        experiments.to_dict(dataclasses.replace(small(), model=mine))


@pytest.mark.parametrize(
    "field, value", [("log.every", 0), ("eval.batches", 0), ("checkpoint.keep_last", 0), ("optimizer.b1", 1.0)]
)
def test_settings_that_would_lose_a_run_are_refused(field, value):
    with pytest.raises(UserError, match=field):
        experiments.replace(small(), {field: value})


def test_replace_checks_types():
    with pytest.raises(UserError, match="batch_size=16.5 is not of the type wanted: int"):
        experiments.replace(small(), {"batch_size": 16.5})


@pytest.mark.deep
def test_freed_memory_stays_mapped(run_python):
    """When a CPU program with 128 MB of temporaries is called again, then their pages are not faulted in again."""
    code = """
import resource, statistics, sys
import jax, jax.numpy as jnp
from engrax.train.host import keep_freed_memory

if not keep_freed_memory():
    print("none")
    sys.exit()
run = jax.jit(lambda x: jnp.sum(jax.lax.optimization_barrier(x * 2)))
x = jnp.ones(2**25)  # 128 MB: more than a thread's own heap can hold
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    run(x).block_until_ready()
counts = [faults()]
for _ in range(9):  # now and then a call begins before the last one's memory is free
    run(x).block_until_ready()
    counts.append(faults())
print(statistics.median(b - a for a, b in zip(counts, counts[1:])))
"""
    printed = run_python(code, devices=1).split()[-1]
    assert printed == "none" or float(printed) < 1000, printed  # 128 MB are 32768 pages


COMPILE_ONCE = """
import jax, jax.numpy as jnp
from engrax.train.host import keep_compiled_programs
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
jnp.ones(3)  # JAX's first program, before the folder is chosen
folder = keep_compiled_programs()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(folder, sum(hits))
"""


def test_a_later_process_finds_the_compiled_programs(run_python, tmp_path):
    """In the cache's folder by default; not if the user turns it off, has an own folder, or cannot write there."""
    cache, none = tmp_path / "cache", "JAX_COMPILATION_CACHE_DIR"

    def run(env):
        folder, hits = run_python(COMPILE_ONCE, devices=1, env={none: None, "ENGRAX_CACHE": cache} | env).split()
        return folder, int(hits)

    folder, hits = run({})
    assert Path(folder).parent == cache / "programs" and hits == 0
    again, hits = run({})
    assert again == folder and hits > 0
    assert run({"JAX_ENABLE_COMPILATION_CACHE": "0"}) == ("None", 0)
    assert run({none: tmp_path / "own"})[0] == "None" and list((tmp_path / "own").glob("jit_*"))
    (tmp_path / "file").write_text("")
    assert run({"ENGRAX_CACHE": tmp_path / "file"})[0] == "None"


def test_the_programs_used_least_recently_are_deleted(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "MOST_BYTES", 250)
    for age, name in enumerate("abcd"):
        (tmp_path / name).write_bytes(b"0" * 100)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    host._delete_oldest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_two_arrays_keep_two_names():
    """A field called value, a dot in a key and keys of one spelling do not merge; none is filled in unseen."""
    tree = {"a": {"kernel": np.ones(1), "value": {"kernel": np.zeros(2)}}, "b.c": np.ones(3), "b": {"c": np.ones(4)}}
    flat = flatten(tree)
    assert sorted(flat) == ["a.kernel", "a.value.kernel", "b%2Ec", "b.c"]
    back = unflatten(flat, tree)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True))
    with pytest.raises(ValueError, match="there is no array a.value.kernel"):
        unflatten({name: x for name, x in flat.items() if name != "a.value.kernel"}, tree)
    with pytest.raises(ValueError, match="two arrays have the name x.0"):
        flatten({"x": [np.ones(1)], "y": 0} | {"x": Both()})


@jax.tree_util.register_pytree_with_keys_class
class Both:
    """A container whose keys 0 and "0" are spelled alike."""

    def tree_flatten_with_keys(self):
        keys = jax.tree_util.SequenceKey(0), jax.tree_util.DictKey("0")
        return [(key, np.ones(1)) for key in keys], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls()


def test_a_parameters_own_value_is_no_part_of_its_name():
    params = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    assert sorted(flatten({"params": params})) == ["params.bias", "params.kernel"]


def test_no_array_of_the_first_state_is_weakly_typed():
    """Else the state comes back from the first step as other types, and the second step compiles again."""
    mixers = (MIXERS["hgrn2"].examples()[0], MIXERS["memorizing"].examples()[0])
    model = LanguageModelConfig(vocab_size=32, dim=16, mixers=mixers, repeat=1, mlp_hidden=16)
    state = Trainer(tiny(model=model)).init_state()
    assert not [name for name, leaf in flatten(state).items() if leaf.weak_type]


def test_the_logged_loss_is_the_datas():
    """What a router's balance adds to the training loss is logged apart, as aux_loss."""
    mixer = MoMConfig(base=LinearAttentionConfig(heads=1, head_dim=4), balance_weight=5.0)
    model = LanguageModelConfig(vocab_size=32, dim=16, mixers=(mixer,), repeat=1, mlp_hidden=16)
    trainer = Trainer(tiny(model=model))
    state, batch = trainer.init_state(), trainer.put(next(trainer.loader("train")))
    nats, count, _ = jax.device_get(trainer.eval_step(state["params"], batch))
    _, values = trainer.train_step(state, batch)
    assert float(values["loss"]) == pytest.approx(float(nats.sum() / count.sum()), rel=1e-5)
    assert float(values["aux_loss"]) > 5.0 * 1.9  # top-2: at least 2 at perfect balance
