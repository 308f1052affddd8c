"""Documents longer than a row: streamed rows, the memory carried from batch to batch, and training in two stages."""

import dataclasses
import importlib.util
import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.data import TextFolder
from engrax.errors import UserError
from engrax.layers import AttentionConfig, HopfieldConfig, MoMConfig
from engrax.models import HMTConfig, LanguageModelConfig, RMTConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.tests.experiments import tiny
from engrax.train import AdamWConfig, CheckpointConfig, ConstantConfig, CosineConfig, loop, run_sources, runs, starting
from engrax.train import experiment as experiments
from engrax.train.checkpoint import Checkpoints
from engrax.train.loop import train
from engrax.train.trainer import Trainer, check

ROWS, SEQ = 4, 24


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n, length in enumerate((70, 5, 31, 24, 160, 48, 9)):
        (folder / f"{n}.txt").write_bytes(bytes(rng.integers(97, 123, length).astype(np.uint8)))
    return TextFolder(path=str(folder), seq_len=SEQ, validation_fraction=0.03)


def rows_of(batches, name):
    return np.concatenate([batch[name] for batch in batches], axis=1)


@pytest.mark.parametrize("align", [1, 8])
def test_rows_go_on_from_batch_to_batch(text, align):
    loader = text.loader("train", batch_size=ROWS, stream=True, align=align)
    batches = [next(loader) for _ in range(12)]
    tokens, targets, ids = (rows_of(batches, name) for name in ("tokens", "targets", "segment_ids"))
    known = {bytes(document) for document in text.documents("train")}
    whole = 0
    for row in range(ROWS):
        for n in range(ids[row].max()):  # the last one may be cut
            where = np.flatnonzero(ids[row] == n)
            assert where[0] % align == 0 and np.all(np.diff(where) == 1)
            assert bytes(tokens[row, where].astype(np.uint8)) in known
            np.testing.assert_array_equal(targets[row, where], [*tokens[row, where[1:]], -1])
            whole += 1
    assert whole > len(known)
    assert set(ids[ids < 0]) == ({-2} if align > 1 else set())  # filler, at the end of a batch too


def test_a_stream_continues_from_its_position_and_is_shared_by_processes(text):
    loader = text.loader("train", batch_size=ROWS, stream=True)
    for _ in range(3):
        next(loader)
    position = loader.get_state()
    wanted = next(loader)
    parts = []
    for process in range(2):
        share = text.loader("train", batch_size=ROWS, stream=True, process_index=process, process_count=2)
        share.set_state(position)
        parts.append(next(share))
    for name, array in wanted.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    with pytest.raises(UserError, match="batch size"):
        text.loader("train", batch_size=2, stream=True).set_state(position)


def experiment(text, **fields):
    backbone = LanguageModelConfig(
        vocab_size=256, dim=8, mixers=(AttentionConfig(heads=2, head_dim=4),), repeat=1, mlp_hidden=8
    )
    model = HMTConfig(
        backbone=backbone, segment_length=8, summary_tokens=4, sensory_tokens=0, cache_size=4, recall_width=4
    )
    fields = dict(model=model, data=text, steps=4, batch_size=ROWS, align=8, carry_memory=True) | fields
    return tiny(**fields)


def state_of(run_dir, settings, step):
    checkpoints = Checkpoints(run_dir)
    state, _ = checkpoints.restore(Trainer(settings).abstract_state(), step)
    checkpoints.close()
    return jax.device_get(state)


@pytest.mark.deep
def test_the_memory_goes_from_batch_to_batch(text):
    settings = experiment(text)
    trainer = Trainer(settings)
    data, state = trainer.loader("train"), trainer.init_state()
    memory = None

    @jax.jit
    def logits_of(params, tokens, memory, ids):
        model = nnx.merge(trainer.graphdef, params)
        hidden, memory = model(tokens, memory, segment_ids=ids)[:2]
        return model.logits(hidden), memory

    for _ in range(2):  # by hand: the loss of every batch, given the memory after the one before
        batch, params = next(data), jax.tree.map(jnp.array, state["params"])  # the step donates its state
        logits, memory = logits_of(params, batch["tokens"], memory, batch["segment_ids"])
        losses = -np.take_along_axis(
            np.asarray(jax.nn.log_softmax(logits)), np.maximum(batch["targets"], 0)[..., None], -1
        )[..., 0]
        wanted = losses[batch["targets"] >= 0].mean()
        state, values = trainer.train_step(state, trainer.put(batch))
        np.testing.assert_allclose(values["loss"], wanted, rtol=1e-5)
    assert int(state["memory"].memory.count.max()) > 3, "more segments than one batch holds"


@pytest.mark.deep
def test_the_memory_goes_with_the_checkpoint(text, tmp_path):
    settings = experiment(text, checkpoint=CheckpointConfig(every=2))
    train(settings, tmp_path / "run", progress=False)
    saved = state_of(tmp_path / "run", settings, 4)
    assert np.any(saved["memory"].memory.cache != 0)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")  # as if it had been stopped at step 2
    train(settings, tmp_path / "run", progress=False)
    again = state_of(tmp_path / "run", settings, 4)
    for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(again)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.long
def test_a_second_stage_begins_with_the_first_ones_parameters(text, tmp_path):
    second = experiment(text, steps=1, optimizer=AdamWConfig(learning_rate=0.0))
    first = dataclasses.replace(second, steps=2, model=dataclasses.replace(second.model, recall="last"))
    first = dataclasses.replace(first, optimizer=AdamWConfig(learning_rate=1e-2, schedule=CosineConfig(warmup_steps=1)))
    train(first, tmp_path / "first", progress=False)
    train(dataclasses.replace(second, start_from=str(tmp_path / "first")), tmp_path / "second", progress=False)
    wanted = state_of(tmp_path / "first", first, 2)["params"]
    found = state_of(tmp_path / "second", second, 1)["params"]
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found)):
        np.testing.assert_array_equal(a, b)  # a learning rate of 0 moves nothing


@pytest.mark.long
def test_a_second_stage_that_lost_its_beginning_begins_with_the_same_parameters(text, tmp_path, monkeypatch):
    """When it was killed before its first checkpoint and the first stage continued, then it starts where it did."""
    # A constant rate, so that the first stage can continue.
    constant = AdamWConfig(learning_rate=1e-2, schedule=ConstantConfig(warmup_steps=1))
    first = experiment(text, steps=1, optimizer=constant, checkpoint=CheckpointConfig(every=1, keep_last=3))
    second = experiment(text, steps=1, optimizer=AdamWConfig(learning_rate=0.0), start_from=str(tmp_path / "first"))
    train(first, tmp_path / "first", progress=False)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(loop.Loop, "run", killed)
        train(second, tmp_path / "second", progress=False)
    train(dataclasses.replace(first, steps=2), tmp_path / "first", progress=False)
    train(second, tmp_path / "second", progress=False)
    started, on, found = (
        state_of(tmp_path / run, first, n)["params"] for run, n in (("first", 1), ("first", 2), ("second", 1))
    )
    same = [all(map(np.array_equal, *map(jax.tree.leaves, (p, found)))) for p in (started, on)]
    assert same == [True, False]


@pytest.mark.parametrize("optimizer", [AdamWConfig(accumulate=2)])
def test_what_a_carried_memory_does_not_do_is_said(text, optimizer):
    with pytest.raises(UserError, match="carry_memory needs"):
        experiment(text, optimizer=optimizer)


def test_the_memory_begins_with_the_earlier_stages_values(text, tmp_path):
    settings = experiment(text)
    settings = dataclasses.replace(
        settings,
        model=RMTConfig(backbone=settings.model.backbone, segment_length=8, memory_tokens=2),
        start_from=str(tmp_path / "first"),
    )
    trainer = Trainer(settings)
    shapes = trainer.abstract_state()["params"]
    params = jax.tree.map(lambda p: jnp.arange(p.size, dtype=p.dtype).reshape(p.shape), shapes)
    earlier = Checkpoints(tmp_path / "first", CheckpointConfig())
    written = {"experiment": experiments.to_dict(settings)}
    (tmp_path / "first" / "config.json").write_text(json.dumps(written))
    earlier.save(3, {"params": params}, {}, None)
    earlier.close()
    state = trainer.init_state(starting.find(trainer, runs.folder(tmp_path / "second"))[1])
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state["params"]), strict=True):
        np.testing.assert_array_equal(a, b)
    initial = state["params"]["initial"][...]
    np.testing.assert_array_equal(state["memory"].memory, np.broadcast_to(initial, (ROWS, *initial.shape)))
    places = jax.tree.map(lambda leaf: leaf.sharding, state["memory"])
    assert places == trainer.state_shardings["memory"]

    other = dataclasses.replace(settings, model=dataclasses.replace(settings.model, memory_tokens=3))
    with pytest.raises(UserError, match=r"start_from=.*initial"):
        train(other, tmp_path / "second", progress=False)
    assert not (tmp_path / "second").exists()


@pytest.mark.parametrize(
    "fields, told",
    [({}, "start_from=.*missing holds no checkpoints"), ({"init_from": "published"}, "init_from and start_from")],
)
def test_a_wrong_beginning_is_refused_before_anything_is_written(text, tmp_path, fields, told):
    settings = experiment(text, start_from=str(tmp_path / "missing"), **fields)
    with pytest.raises(UserError, match=told):
        train(settings, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists() and not (tmp_path / "missing").exists()


def test_a_second_stage_can_be_exported_as_the_first(text, tmp_path):
    described = tmp_path / "first" / "pretrained"
    described.mkdir(parents=True)
    (described / "config.json").write_text("{}")
    runs.prepare(tmp_path / "second", experiment(text, start_from=str(tmp_path / "first")))
    assert (tmp_path / "second" / "pretrained" / "config.json").read_text() == "{}"
    runs.prepare(tmp_path / "third", experiment(text, start_from=str(tmp_path / "unknown")))
    assert not (tmp_path / "third" / "pretrained").exists()


def test_a_carried_row_goes_on_for_ever(text):
    def of(*mixers, **fields):
        return LanguageModelConfig(vocab_size=256, dim=8, mixers=mixers, repeat=1, **fields)

    windowed, placed = AttentionConfig(window=8), BlockStyleConfig(positions=64)
    for model, told in (
        (of(windowed, AttentionConfig()), "attention without a window"),
        (of(HopfieldConfig(capacity=7)), "capacity=7"),
        (of(windowed, layout=placed), "layout.positions=64"),
    ):
        with pytest.raises(UserError, match=f"carry_memory: carried rows are unbounded.*{told}"):
            check(experiment(text, model=model))
        check(experiment(text, model=model, carry_memory=False))
        check(experiment(text, model=RMTConfig(backbone=model)))  # reads segment by segment
    check(experiment(text, model=of(windowed)))


def test_a_memory_is_carried_through_streams_only(text):
    settings = experiment(text)
    with pytest.raises(UserError, match="carry_memory needs rows that continue .* mqar has none"):
        check(dataclasses.replace(settings, data=tiny().data))


def test_the_source_of_a_wrapped_mixer_is_kept(text, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from engrax.layers import LinearAttentionConfig\n\n\nclass Mine(LinearAttentionConfig):\n    pass\n"
    )
    spec = importlib.util.spec_from_file_location("mine", tmp_path / "mine.py")
    mine = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "mine", mine)
    spec.loader.exec_module(mine)
    settings = experiment(text)
    backbone = dataclasses.replace(settings.model.backbone, mixers=(MoMConfig(base=mine.Mine()),))
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, backbone=backbone))
    (tmp_path / "run").mkdir()
    run_sources.copy(runs.folder(tmp_path / "run"), settings, None)
    assert sorted(file.name for file in (tmp_path / "run" / "source").iterdir()) == ["manifest.json", "mine.py"]
