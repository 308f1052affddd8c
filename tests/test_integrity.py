"""Checkpoints are what was saved, or it is said and the one before is used."""

import contextlib
import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from engrax.errors import Damaged, Diverged, UserError
from engrax.tests import damaged_checkpoints as damaged
from engrax.train import CheckpointConfig, checkpoint, integrity, metrics, resume, saver
from engrax.train.checkpoint import Checkpoints
from engrax.train.experiment import LogConfig


class Data:
    """A loader's position."""

    def __init__(self):
        self.state = {"next_index": 0}

    def get_state(self):
        return dict(self.state)

    def set_state(self, state):
        if set(state) != {"next_index"}:
            raise ValueError("no position")
        self.state = dict(state)


def state_at(step):
    """A training state, without a model: parameters, moments, a carried memory with an infinity, the step."""
    values = jnp.arange(600, dtype=jnp.float32).reshape(20, 30) + step
    memory = {"keys": values.astype(jnp.bfloat16), "best": jnp.full(3, -jnp.inf)}
    moments = {"mu": values / 7, "count": jnp.int32(step)}
    return {"params": {"w": values}, "opt_state": moments, "memory": memory, "step": jnp.int32(step)}


LIKE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_at(0))
WANTED = {step: (state_at(step), {"next_index": step}) for step in (4, 8)}


def save(run_dir, step, loss=None, state=None, config=None):
    checkpoints = Checkpoints(run_dir, config or CheckpointConfig(keep_last=5))
    try:
        position = {"position": {"next_index": step}, "data_digest": "of the data"}
        checkpoints.save(step, state or state_at(step), position, {"validation_loss": loss} if loss else None)
        checkpoints.wait()
    finally:
        checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    for step, loss in ((4, 1.0), (8, 2.0)):
        save(folder, step, loss)
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A copy of a run's checkpoints of steps 4 (the better) and 8."""
    checkpoint._say.cache_clear()
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def unseal(folder):
    """As engrax saved it before it had digests."""
    (folder / "digests.json").unlink()
    found = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(found | {"custom_metadata": {}}))


def test_whole_checkpoints_are_read(run, capsys):
    assert damaged.verdict(run, LIKE, Data(), WANTED) == "harmless" and not capsys.readouterr().err


def test_a_sample_of_damages_is_noticed(run):
    """test_every_damage (deep) does all of them."""
    wrong, seen = [], 0
    for i, path in enumerate(damaged.files(run / "checkpoints" / "8")):
        for what, do, undo in list(damaged.damages(path))[i % 5 :: 8]:
            do()
            if (found := damaged.verdict(run, LIKE, Data(), WANTED)) != "noticed":
                wrong.append((what, found))
            undo()
            seen += 1
    assert seen >= 25 and not wrong
    assert damaged.verdict(run, LIKE, Data(), WANTED) == "harmless", "the damages were undone"


def test_a_file_too_many_is_noticed(run):
    (run / "checkpoints" / "8" / "state" / "d" / "more").write_bytes(b"")
    assert damaged.restored(run, LIKE, Data())[2:] == (4, {8: "state/d/more does not belong to it"})


def test_what_is_wrong_names_the_file(run):
    folder = run / "checkpoints" / "8"
    for path, change, told in (
        (folder / "state" / "_METADATA", lambda path: path.unlink(), "state/_METADATA is missing"),
        (folder / "data" / "metadata", lambda path: path.write_bytes(b""), "data/metadata has 0 bytes instead of"),
        (folder / "state" / "manifest.ocdbt", flip, "state/manifest.ocdbt differs from its digest"),
        (folder / "digests.json", flip, "digests.json is missing or no list of digests"),
        (folder / "digests.json", lambda path: path.unlink(), "digests.json is missing or no list of digests"),
    ):
        whole = path.read_bytes()
        change(path)
        assert integrity.unsound(epath.Path(folder)).startswith(told)
        path.write_bytes(whole)


def test_none_is_sound(run):
    for step in (4, 8):
        flip(run / "checkpoints" / str(step) / "data" / "metadata")
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(UserError, match=r"no checkpoint can be read.*8 is damaged \(data.*4 is damaged \(data"):
        resume.find(epath.Path(run))
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == before, "nothing was renamed"


def test_readers_say_so_and_rename_nothing(run, capsys):
    flip(run / "checkpoints" / "8" / "state" / "manifest.ocdbt")
    reader = Checkpoints(run)
    assert reader.read(None, lambda step: step) == (4, 4)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "8 is damaged (state/manifest.ocdbt" in told and "step 4 is read instead" in told
    assert reader.steps() == [4, 8]
    with pytest.raises(Damaged, match="choose another step .4"):
        Checkpoints(run).read(8, lambda step: step)
    with pytest.raises(Damaged, match="manifest"):
        Checkpoints(run).restore(LIKE, 8)


def test_the_best_one_is_not_taken_from_damaged_metrics(run, capsys):
    assert Checkpoints(run).read("best", lambda step: step)[1] == 4
    path = run / "checkpoints" / "4" / "metrics" / "metrics"
    path.write_text(path.read_text().replace("1.0", "9.0"))
    assert Checkpoints(run).read("best", lambda step: step)[1] == 8
    assert "4 is damaged (metrics/metrics differs" in capsys.readouterr().err


def test_checkpoints_from_before_the_digests_are_read(run, capsys):
    for step in (4, 8):
        unseal(run / "checkpoints" / str(step))
    for _ in range(2):
        assert damaged.verdict(run, LIKE, Data(), WANTED) == "harmless"
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "8 has no digests" in told
    flip(run / "checkpoints" / "8" / "state" / "manifest.ocdbt")  # Orbax finds this one
    assert damaged.verdict(run, LIKE, Data(), WANTED) == "noticed"


def test_a_position_that_does_not_fit_the_data(run):
    class Other(Data):
        def set_state(self, state):
            if state["next_index"] > 5:
                raise ValueError("the data have 5 rows")
            super().set_state(state)

    _, position, step, found = damaged.restored(run, LIKE, Other())
    assert (position, step) == ({"next_index": 4}, 4) and "position in the data makes no sense: the data have" in found[
        8
    ]
    with pytest.raises(UserError, match="checkpoint 8 in .* was saved with other data"):
        resume.find(epath.Path(run)).restore(LIKE, Data(), "of other data")


def test_a_position_that_is_no_count_is_damaged(run):
    checkpoints = Checkpoints(run, CheckpointConfig(keep_last=5))
    checkpoints.save(12, state_at(12), {"position": {"next_index": -1}, "data_digest": None}, None)
    checkpoints.close()
    _, _, step, found = damaged.restored(run, LIKE, Data())
    assert step == 8 and "-1 is no position" in found[12]


def test_damaged_ones_are_put_aside_under_new_names(run, capsys):
    for _ in range(2):
        flip(run / "checkpoints" / "8" / "state" / "_METADATA")
        earlier = resume.find(epath.Path(run))
        earlier.checkpoints.put_aside()
        assert not (run / "checkpoints" / "8").exists()
        save(run, 8)
    assert Checkpoints(run).steps() == [4, 8]
    assert {"8.damaged", "8.damaged+"} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert capsys.readouterr().err.count("is now") == 2


def test_the_next_training_ends_a_removal_that_was_cut_off(run):
    checkpoints = Checkpoints(run, CheckpointConfig())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(checkpoints.directory), "rmtree", lambda folder: None)  # killed at this moment
        checkpoints._saver.remove(4)
    checkpoints.close()
    assert Checkpoints(run).steps() == [8] and len(list((run / "checkpoints").iterdir())) == 2
    Checkpoints(run, CheckpointConfig()).close()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["8"]


def test_a_nan_is_found_in_every_type_and_a_large_number_is_none():
    """The sum that finds it must not overflow: types of 8 bits have no infinity, only NaN."""
    largest = {t: jnp.full(64, jnp.finfo(t).max, t) for t in ("float32", "bfloat16", "float16", "float8_e4m3fn")}
    assert not any(saver._find_nan(largest).values())
    assert all(saver._find_nan({name: x.at[5].set(jnp.nan) for name, x in largest.items()}).values())


def test_a_nan_in_the_state_is_not_saved(run):
    state = state_at(12)
    state["memory"]["keys"] = state["memory"]["keys"].at[3, 4].set(jnp.nan)
    with pytest.raises(Diverged, match="state after step 12 has a NaN in memory.keys, so it was not saved"):
        save(run, 12, state=state, config=CheckpointConfig(keep_last=1))
    assert Checkpoints(run).steps() == [4, 8]
    assert not list((run / "checkpoints").glob("*tmp*"))


def test_the_newest_and_the_best_are_kept(tmp_path):
    config = CheckpointConfig(keep_last=1, keep_best=1)
    for step, loss in enumerate((3.0, 1.0, 2.0, float("inf")), 1):
        save(tmp_path, step, loss, config=config)
    assert Checkpoints(tmp_path).steps() == [2, 4]
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "4"}


@pytest.mark.parametrize("sealed", [True, False])
def test_a_checkpoint_that_cannot_be_judged_is_kept(run, sealed):
    """Its validation loss is damaged: it may be the best."""
    if not sealed:
        unseal(run / "checkpoints" / "4")
    (run / "checkpoints" / "4" / "metrics" / "metrics").write_text('{"validation_loss": "low"}')
    save(run, 12, 3.0, config=CheckpointConfig(keep_last=1, keep_best=0))
    assert Checkpoints(run).steps() == [4, 12]


def test_a_checkpoint_that_goes_under_a_reader_is_gone_and_the_next_is_read(run, capsys):
    reader = Checkpoints(run)

    def removed(step):
        if step == 8:  # the training has saved 12 and removes 8
            save(run, 12, config=CheckpointConfig(keep_last=1, keep_best=0))
        return reader.restore(LIKE, step)[0]

    state, step = reader.read(None, removed)
    assert step == 12 and int(state["step"]) == 12
    told = capsys.readouterr().err
    assert "8 is gone" in told and "damaged" not in told


# A full disk.


@contextlib.contextmanager
def full(monkeypatch, times):
    """The next `times` seals find no room."""
    left, seal = [times], integrity.seal

    def refuse(folder, **options):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(folder, **options)

    with monkeypatch.context() as m:
        m.setattr(integrity, "seal", refuse)
        yield


def test_with_a_full_disk_the_run_goes_on_and_saves_when_there_is_room(run, monkeypatch, capsys):
    checkpoints = Checkpoints(run, CheckpointConfig(keep_last=1, keep_best=0))
    with full(monkeypatch, 2):
        for step in (12, 16, 20):
            checkpoints.save(step, state_at(step), {}, None)
        assert checkpoints.steps() == [4, 8], "nothing was removed for what was not saved"
        checkpoints.close()
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and all("the disk is full" in line and "the run continues" in line for line in told)
    assert checkpoints.steps() == [20] and not list((run / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize("when_full", ["stop", "go_on"])
def test_a_full_disk_at_the_end_or_with_stop_is_an_error(run, monkeypatch, when_full):
    checkpoints = Checkpoints(run, CheckpointConfig(when_full=when_full))
    with full(monkeypatch, 1):
        checkpoints.save(12, state_at(12), {}, None)
        with pytest.raises(UserError, match="disk is full: step 12 was not saved.*newest checkpoint is of step 8"):
            checkpoints.wait() if when_full == "go_on" else checkpoints.save(16, state_at(16), {}, None)
    checkpoints.close()
    assert checkpoints.steps() == [4, 8]


def test_a_disk_too_full_to_begin_the_last_save_is_an_error(run, monkeypatch, capsys):
    """Before the thread starts. Earlier saves that fail so are told, and the run continues."""
    checkpoints = Checkpoints(run, CheckpointConfig())

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(checkpoints._saver._checkpointer), "save", refuse)
    for step in (12, 16):
        checkpoints.save(step, state_at(step), {}, None)
    with pytest.raises(UserError, match="disk is full: step 16 was not saved.*newest checkpoint is of step 8"):
        checkpoints.wait()
    checkpoints.close()
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "step 12 was not saved" in told and checkpoints.steps() == [4, 8]


def test_metrics_wait_for_room(tmp_path, monkeypatch, capsys):
    writer = metrics.MetricsWriter(epath.Path(tmp_path), LogConfig(), resumed_at=0, settings={})
    writer.write(1, {"loss": 3.0})

    class Full:
        """A file that takes half of what is written."""

        def __init__(self, path):
            self.file = open(path, "a")

        def write(self, text):
            self.file.write(text[: len(text) // 2])
            self.file.close()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    with monkeypatch.context() as m:
        m.setattr(type(writer.path), "open", lambda path, mode: Full(path))
        for step in (2, 3):
            writer.write(step, {"loss": 2.0})
    assert [row["step"] for row in metrics.read(tmp_path)] == [1] and (tmp_path / "metrics.jsonl").read_text()[
        -1
    ] == "\n"
    writer.write(4, {"loss": 1.0})
    writer.close()
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("the disk is full") == 1


def test_errors_that_mean_a_full_disk():
    full = OSError(errno.ENOSPC, "x")
    try:
        raise ValueError("wrapped") from full
    except ValueError as wrapped:
        assert saver.is_full(wrapped) and saver.is_full(full)
    assert saver.is_full(ValueError("UNKNOWN: write: [OS error 28: No space left on device]"))
    assert not saver.is_full(OSError(errno.EACCES, "x")) and not saver.is_full(None)
    np.testing.assert_equal(saver.first_line(ValueError("a\nb")), "a")
