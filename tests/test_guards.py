"""Guards: a bad step changes nothing, and the loop skips it, goes back, or ends."""

import dataclasses
import errno
import json
import math
import os
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from engrax.errors import Diverged, Exit, UserError
from engrax.flags import override
from engrax.tests.experiments import tiny
from engrax.tests.faults import FAULTS, GUARD, Faulty, Rows, experiment, identity_of, same
from engrax.train import CheckpointConfig, GuardConfig, guards, integrity, metrics, resume, run_lock
from engrax.train.checkpoint import Checkpoints
from engrax.train.distributed import StopSignal
from engrax.train.loop import Loop
from engrax.train.watchdog import Watchdog

VERDICTS = {"forward": "not_finite", "gradient": "not_finite", "memory": "memory_not_finite", "spike": "gradient_spike"}


@pytest.fixture(scope="module")
def trainer():
    """One compiled step for all tests here: skip and rewind have the same."""
    trainer = Faulty(experiment())
    trainer.__dict__["begin"] = jax.device_get(trainer.init_state())
    assert trainer.train_step and trainer.advance
    return trainer


def test_a_bad_step_is_the_identity(trainer):
    """To the bit: parameters, moments, counts, memory and statistics stay; what follows is as if it had not been."""
    for fault, found in identity_of(trainer, FAULTS).items():
        assert guards.VERDICTS[found["verdict"]] == VERDICTS[fault]
        moved, before = found["moved"], found["before"]
        assert set(moved) == {"params", "opt_state", "step", "memory", "guard"}
        assert moved["step"] == before["step"] + 1
        assert same(moved | {"step": 0}, before | {"step": 0}), fault
        assert same(found["end"], found["wanted"]), fault
        assert not same(found["end"]["params"], before["params"])


def judged(config, losses, norms=None):
    """The verdicts on the steps of a run, by their losses and gradient norms, and the statistics after them."""
    state, verdicts = {"step": 0, **guards.fresh(config)}, []
    for loss, norm in zip(losses, norms or [1.0] * len(losses)):
        state, found = guards.settle(config, state, state, jnp.float32(loss), jnp.float32(norm))
        verdicts.append(guards.VERDICTS[int(found["verdict"])])
    return verdicts, state["guard"]


def test_the_statistics_of_spikes():
    """Mean and variance of the logarithms: of all sound steps up to the horizon, then exponential."""
    config, rng = GuardConfig(action="skip", sigma=50.0, horizon=8, warmup=2), np.random.default_rng(0)
    values = np.exp(rng.normal(size=(11, 2)))
    logs, weights = np.log(values), np.full(8, 1 / 8)
    for n in (8, 9, 10, 11):
        if n > 8:
            weights = np.append(weights * 7 / 8, 1 / 8)
        _, found = judged(config, *values[:n].T.tolist())
        mean = weights @ logs[:n]
        np.testing.assert_allclose(found["mean"], mean, atol=1e-5)
        np.testing.assert_allclose(found["variance"], weights @ (logs[:n] - mean) ** 2, atol=1e-5)
    assert judged(config, [2.0, math.nan, 2.0])[1]["steps"] == 2, "only sound steps count"


def test_what_is_a_spike():
    """Three deviations above the mean, after the warmup. Small deviations and small values count as the least ones."""
    config = GuardConfig(action="skip", sigma=3.0, horizon=8, warmup=4)
    for before, value, found in (
        ([2.0] * 3, 9.0, "sound"),  # the warmup
        ([2.0] * 4, 9.0, "loss_spike"),
        ([2.0] * 4, 0.01, "sound"),  # a low one
        ([2.0] * 4, 2.0 * math.exp(2.9 * 0.02), "sound"),
        ([2.0] * 4, 2.0 * math.exp(3.1 * 0.02), "loss_spike"),
        ([2.0, 4.0] * 2, math.sqrt(8) * 2**1.45, "sound"),  # the deviation is half of log 2
        ([2.0, 4.0] * 2, math.sqrt(8) * 2**1.55, "loss_spike"),
        ([1e-4] * 4, 0.0099, "sound"),  # both count as 0.01
    ):
        assert judged(config, [*before, value])[0] == ["sound"] * len(before) + [found], (before, value)
    assert judged(config, [2.0] * 5, [1.0] * 4 + [9.0])[0][-1] == "gradient_spike"


DEEP = """
import dataclasses
from engrax.tests.faults import Faulty, experiment, identity_of, same
from engrax.train import ParallelConfig
for strategy in ("pjit", "pmap"):
    faults = ("forward", "gradient", "spike") + (("memory",) if strategy == "pjit" else ())
    parallel = ParallelConfig(strategy=strategy, data=2, fsdp=4, zero=3)
    trainer = Faulty(experiment(parallel=parallel, carry_memory=strategy == "pjit"))
    for fault, found in identity_of(trainer, faults).items():
        kept = same(found["moved"] | {"step": 0}, found["before"] | {"step": 0})
        print(strategy, fault, found["verdict"], kept, same(found["end"], found["wanted"]))
"""


@pytest.mark.deep
def test_sharded_over_devices_all_decide_alike(run_python):
    """ZeRO 3 on 8 devices, with the fault in one device's row."""
    lines = run_python(DEEP, devices=8).split("\n")[:-1]
    assert len(lines) == 7 and all(line.endswith("True True") for line in lines), lines


def run(trainer, folder, faults, *, steps=10, **fields):
    """Trains up to a step in `folder`, from its newest checkpoint. Returns (final state, rows by step, loop)."""
    every = fields.pop("every", 4)
    guard = dataclasses.replace(GUARD, **fields)
    settings = experiment(guard=guard, steps=steps, checkpoint=CheckpointConfig(every=every, keep_last=9))
    own = Faulty(settings)
    parts = {name: part for name, part in vars(trainer).items() if name not in ("experiment", "devices")}
    own.__dict__.update(parts, validate=lambda *_: {"validation_loss": 1.0}, diagnose=lambda _: {})
    data, checkpoints = guards.Guarded(Rows(faults), guard), Checkpoints(folder, settings.checkpoint)
    saved = max(checkpoints.steps(), default=0)
    state = jax.device_put(trainer.begin, own.state_shardings)
    if saved:
        state = own.with_guard(resume.restore(checkpoints, own.stored_state(), data, None, saved), data.statistics)
    clock = metrics.Clock()
    bar = metrics.Progress(saved, steps, 1, clock, active=False)
    writer = metrics.MetricsWriter(epath.Path(folder), settings.log, resumed_at=saved, settings={})
    loop = Loop(own, checkpoints, writer, bar, clock, Watchdog(0, writer.path), saved=saved)
    try:
        with StopSignal() as stop:
            _, state = loop.run(state, data, saved, stop, None if saved else next(data))
    finally:
        checkpoints.close()
    rows = {row["step"]: row for row in metrics.read(folder)}
    assert list(rows) == sorted(rows) and len(rows) == len(metrics.read(folder)), "a step is logged once, in its place"
    return jax.device_get(state), rows, loop


@pytest.fixture(scope="module")
def without(trainer, tmp_path_factory):
    """The final state of the run that drops the batches of some steps unseen."""
    found = {}

    def without(*steps):
        if steps not in found:
            folder = tmp_path_factory.mktemp("without")
            found[steps] = run(trainer, folder, {}, skip_batches=steps, every=0)[0]
        return found[steps]

    return without


def test_skipped_steps_are_logged_and_the_rest_is_as_without_them(trainer, tmp_path, without):
    state, rows, loop = run(trainer, tmp_path, {6: "spike", 7: "forward"})
    assert same(state, without(6, 7)) and int(state["step"]) == 10
    assert sorted(rows) == list(range(1, 11))
    assert rows[6]["skipped_gradient_spike"] == 1.0 and rows[7]["skipped_not_finite"] == 1.0
    assert rows[7]["loss"] == "nan" and not [k for n in (5, 8) for k in rows[n] if k.startswith("skipped")]
    assert loop.bar.shown["skipped"] == "2" and rows[5]["save_blocked_seconds"] > 0
    assert "save_blocked_seconds" not in rows[4]


def test_a_run_goes_back_and_on_without_the_batches(trainer, tmp_path, without, capsys):
    """From step 7 to the checkpoint of step 4, not to that of step 6, which has learnt from a dropped batch."""
    state, rows, _ = run(trainer, tmp_path, {7: "spike"}, action="rewind", drop=2, every=2)
    assert same(state, without(6, 7)) and sorted(rows) == list(range(1, 11))
    assert rows[6]["skipped_before_bad"] == 1.0 and "loss" not in rows[6]
    assert rows[7]["skipped_gradient_spike"] == 1.0 and rows[7]["grad_norm"] > 100
    told = capsys.readouterr().err
    assert "the gradient norm of step 7" in told and "back to step 4, without the batches of steps 6 to 7" in told
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(keep_last=9))
    checkpoints.delete_after(6)  # as if it had been killed there: what is dropped is known
    checkpoints.close()
    assert same(run(trainer, tmp_path, {}, action="rewind", drop=2, every=2)[0], without(6, 7))


def test_a_way_back_deletes_later_checkpoints_and_passes_a_damaged_one(trainer, tmp_path, without, monkeypatch, capsys):
    rewind, left, restore, freed = Loop.rewind, [], resume.restore, []

    def damaged_before(loop, *args):
        loop.checkpoints.wait()
        array = weakref.ref(jax.tree.leaves(loop._state["params"])[0])

        def and_look(*args):  # the state that is left makes room for the one that is read
            freed.append(array() is None)
            return restore(*args)

        monkeypatch.setattr(resume, "restore", and_look)
        next((tmp_path / "checkpoints" / "4" / "state").rglob("d/*")).write_bytes(b"")
        back = rewind(loop, *args)
        left.append(loop.checkpoints.steps())
        return back

    monkeypatch.setattr(Loop, "rewind", damaged_before)
    state, _, _ = run(trainer, tmp_path, {7: "spike"}, action="rewind", drop=2, every=2)
    told = capsys.readouterr().err
    assert told.count("\n") == 2 and "choose" not in told
    assert "checkpoint 4 is damaged" in told and "back to step 2, without the batches of steps 6 to 7" in told
    assert left == [[2]] and freed == [True, True] and same(state, without(6, 7))


def test_a_second_way_back_verifies_the_checkpoint_again(trainer, tmp_path, without, monkeypatch, capsys):
    """After the first way back, the position in checkpoint 4 changes: only the digest shows it. The second takes 2."""
    rewind = Loop.rewind

    def damaged_after(loop, *args):
        back = rewind(loop, *args)
        path = tmp_path / "checkpoints" / "4" / "data" / "metadata"
        if back == 4:
            whole = path.read_text()
            path.write_text(whole.replace("4", "3"))
            assert path.read_text() != whole
        return back

    monkeypatch.setattr(Loop, "rewind", damaged_after)
    state, _, _ = run(trainer, tmp_path, {5: "spike", 6: "spike"}, action="rewind", every=2)
    told = capsys.readouterr().err
    assert "back to step 4, without the batches of steps 5 to 5" in told
    assert "is damaged (data/metadata differs from its digest)" in told
    assert "back to step 2, without the batches of steps 6 to 6" in told
    assert same(state, without(5, 6))


def test_a_way_back_with_a_full_disk(trainer, tmp_path, without, monkeypatch, capsys):
    """The save of step 4 finds no room. The run continues from step 2."""
    seal = integrity.seal

    def refuse(folder, **options):
        if folder.name.startswith("4"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        seal(folder, **options)

    monkeypatch.setattr(integrity, "seal", refuse)
    state, _, _ = run(trainer, tmp_path, {5: "spike"}, action="rewind", every=2)
    told = capsys.readouterr().err
    assert "step 4 was not saved" in told and "back to step 2" in told and same(state, without(5))


def test_a_way_back_takes_nothing_from_a_folder_that_is_anothers(trainer, tmp_path, monkeypatch):
    """It deletes no checkpoint and no line of the metrics. A save would stop as well."""
    rewind, config = Loop.rewind, epath.Path(tmp_path) / "config.json"
    config.write_text("{}")

    def anothers(loop, bad, data):
        loop.ours = run_lock.Mark(config)
        config.write_text("{ }")
        with pytest.raises(UserError, match="another run's now; the training stopped at step 9"):
            loop.save(9, loop._state, data)
        return rewind(loop, bad, data)

    monkeypatch.setattr(Loop, "rewind", anothers)
    with pytest.raises(UserError, match="another run's now; the training stopped at step 7"):
        run(trainer, tmp_path, {7: "spike"}, action="rewind", drop=4, every=2)
    assert Checkpoints(tmp_path).steps() == [2, 4, 6] and metrics.read(tmp_path)[-1]["step"] == 6


def test_a_signal_at_a_bad_step_ends_the_run_where_it_went_back_to(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(StopSignal, "reached", lambda _, step: step == 7)
    state, rows, loop = run(trainer, tmp_path, {7: "spike"}, action="rewind")
    assert int(state["step"]) == loop.saved == max(rows) == 4


def test_what_a_bad_step_ends(trainer, tmp_path):
    """By choice, after too many in a row, or with no checkpoint to go back to; another try passes the batch."""
    with pytest.raises(
        Diverged, match="loss or the gradient of step 6 is not finite; the checkpoint of step 4 is sound"
    ):
        run(trainer, tmp_path / "a", {6: "gradient"}, action="abort")
    with pytest.raises(Diverged, match="step 6 .*Resume with --guard.skip-batches 5 6 to go past this batch"):
        run(trainer, tmp_path / "a", {6: "gradient"}, action="abort", skip_batches=(5,))
    assert int(run(trainer, tmp_path / "a", {6: "gradient"}, action="abort", skip_batches=(6,))[0]["step"]) == 10
    faults = dict.fromkeys((5, 6, 7), "forward")
    with pytest.raises(Diverged, match="step 7 is not finite, after 2 bad steps in a row, as many as guard.limit"):
        run(trainer, tmp_path / "b", faults)
    for drop, first in ((1, 3), (5, 1)):
        with pytest.raises(Diverged, match=f"step 3 is not finite, and no checkpoint from before step {first} is left"):
            run(trainer, tmp_path / "c", {3: "forward"}, action="rewind", drop=drop)


def test_statistics_survive_a_resume(trainer, tmp_path):
    """A run that stops at step 8 and continues has the state of one that does not, guards included."""
    whole, _, _ = run(trainer, tmp_path / "whole", {6: "spike"})
    run(trainer, tmp_path / "parts", {6: "spike"}, steps=8)
    parts, _, loop = run(trainer, tmp_path / "parts", {6: "spike"})
    assert same(whole, parts) and int(whole["guard"]["steps"]) == 9
    assert loop.bar.shown["skipped"] == "1"


def test_the_position_travels_as_json():
    data = guards.Guarded(Rows(step=4), GUARD)
    data.bad[3] = {"loss": float("nan"), "skipped_not_finite": 1.0}
    position = json.loads(json.dumps(data.get_state(), allow_nan=False))
    again = guards.Guarded(Rows(), GUARD)
    again.set_state(position)
    assert again.data.step == 4 and list(again.bad) == [3] and again.get_state() == position
    plain = guards.Guarded(Rows(step=4), GuardConfig())
    assert plain.get_state() == {"step": 4}, "without guards the position is the data's alone"


def test_a_flat_loss_is_told_once():
    flat = guards.FlatLoss(tiny())  # 32 tokens, 3.466 nats; a warmup of 2 steps
    told = [flat.seen(step, 3.5) for step in range(1, 2 * guards.FLAT + 3)]
    assert [n + 1 for n, text in enumerate(told) if text] == [guards.FLAT + 2]
    assert "above 3.466, that of a uniform guess among 32 tokens" in told[guards.FLAT + 1]
    flat = guards.FlatLoss(tiny())
    assert not any(flat.seen(step, 3.4 if step % 90 == 0 else 3.5) for step in range(1, 300))


def test_guards_are_flags_that_a_resume_may_change(tmp_path):
    from engrax.train import runs

    changed = override(tiny(), ["--guard.action", "skip", "--guard.skip-batches", "7", "9"], "train")
    assert changed.guard == GuardConfig(action="skip", skip_batches=(7, 9))
    runs.refuse_differences(tiny(), changed, 4, tmp_path)
    for field, told in (({"skip_batches": (0,)}, "count from 1"), ({"limit": 0}, "guard.limit=0")):
        with pytest.raises(UserError, match=told):
            GuardConfig(**field)
    with pytest.raises(UserError, match="goes back to a checkpoint"):
        tiny(guard=GuardConfig(action="rewind"), checkpoint=CheckpointConfig(every=0))


HANG = """
import sys, time
from etils import epath
from engrax.train.watchdog import Watchdog
def hang():
    time.sleep(60)
with Watchdog(0.4, epath.Path("stacks.txt")) as dog:
    time.sleep(0.6)  # nothing is watched yet
    dog.alive()
    with dog.paused():
        time.sleep(0.6)
    for _ in range(6):
        time.sleep(0.1)
        dog.alive()
    print("steps done", flush=True)
    hang()
"""


def test_a_step_that_hangs_ends_the_process(run_python, tmp_path):
    began = time.monotonic()
    assert run_python(HANG, devices=1, returncode=Exit.HUNG) == "steps done\n"
    assert time.monotonic() - began < 50
    for stacks in ((tmp_path / "stacks.txt").read_text(), run_python.last.stderr):
        assert "in hang" in stacks and "engrax-watchdog" in stacks or "Thread" in stacks
    assert "no step has ended for 0.4 s" in run_python.last.stderr.splitlines()[-1]
