"""Users' mistakes: one line and exit code 2 before any long computation, 130 for Ctrl-C, and nothing left behind."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from engrax import cli, evals
from engrax.errors import CannotRun, Damaged, Diverged, UserError
from engrax.evals import Comparison, trials
from engrax.pallas_kernels import available, linear_attention
from engrax.tests.experiments import tiny
from engrax.train import distributed, fit, loop, metrics, runs
from engrax.train.trainer import Trainer


def mistake(capsys, *args: str) -> str:
    """The one line that a mistake prints."""
    assert cli.main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("engrax: "), lines
    return lines[0]


@pytest.mark.parametrize(
    "args, told",
    [
        (["--data.seq-len", "100000000"], "needs at least .* of memory, and this machine has"),
        (["--data.seq-len", "1e8"], "--data.seq-len"),
        (["--batch-size", "100000000000"], "batch_size=100000000000 makes no sense"),
        (["--batch-size", "100000000"], "needs at least .* of memory"),
        (["--model.dim", "1000000"], "needs at least .* of memory"),
        (["--model.mlp-hidden", "100000000"], "needs at least .* of memory"),
        (["--model.repeat", "100000000"], "needs at least .* of memory"),
        (["--optimizer.learning-rate", "nan"], "learning_rate=nan"),
        (["--optimizer.learning-rate", "inf"], "learning_rate=inf"),
        (["--optimizer.weight-decay", "-inf"], "weight_decay"),
        (["--optimizer.clip-norm", "nan"], "clip_norm"),
        (["--seed", "-1"], "seed=-1 must not be negative"),
        (["--seed", "9999999999"], "seed=9999999999 makes no sense"),
        (["--steps", "1e12"], "--steps"),
        (["--steps", "1000000000000"], "steps=1000000000000 makes no sense"),
        (["--run-dir", ""], "--run-dir: it is empty"),
        (["--run-dir", "file"], "file is a file, not a folder"),
        (["--run-dir", "file/run"], "file is a file, not a folder"),
        (["--log.wandb", "online"], "needs an API key"),
        (["--parallel.fsdp", "3"], "set --parallel.fsdp to a divisor of 1"),
        (["--checkpoint.keep-last", "-1"], "keep_last"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_a_training_that_cannot_be(capsys, tmp_path, monkeypatch, args, told):
    """ultralytics/yolov5#2848: without a key, wandb raised an error in the middle of the start."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(Trainer, "loader", lambda *_: pytest.fail("data were read"))
    monkeypatch.setattr(Trainer, "init_state", lambda *_: pytest.fail("arrays were made"))
    assert re.search(told, mistake(capsys, "train", "quickstart", *args))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize(
    "args, told",
    [
        (["describe", ""], "it is empty"),
        (["describe", "quickstart", "--seed", "-1"], "must not be negative"),
        (["describe", "quickstart", "--batch-size", "100000000000"], "makes no sense"),
        (["evaluate", "file"], "file is a file; give the folder"),
        (["evaluate", ""], "it is empty"),
        (["evaluate", "file", "--batches", "0"], "must be at least 1"),
        (["evaluate", "file", "--batches", "1e9"], "--batches"),
        (["evaluate", "file", "--stream", "-5"], "must be at least 1"),
        (["generate", "file", "--prompt", "x"], "file is a file"),
        (["export", "file", "file"], "file is a file; choose a folder"),
        (["export", "run", ""], "it is empty"),
        (["compare", "titans_ablation", "--folder", ""], "it is empty"),
        (["compare", "titans_ablation", "--folder", "file"], "file is a file"),
        (["compare", "titans_ablation", "--seeds", "-1"], "must be at least 1"),
        (["compare", "titans_ablation", "--batch-size", "100000000"], "needs at least"),
        (["compare", "titans_ablation", "--optimizer.b1", "nan"], "b1"),
        (["check", ""], "it is empty"),
        (["check", "file"], "unknown mixer or model 'file'"),
        (["bench", "linear_attention", "--runs", "0"], "must be at least 1"),
        (["bench", "linear_attention", "--output", "."], "is a folder"),
        (["bench", "linear_attention", "--output", "file/x.json"], "file is a file"),
        (["bench", "linear_attention", "--output", ""], "it is empty"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_other_commands(capsys, tmp_path, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    assert told in mistake(capsys, *args)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_implementation_is_a_users_mistake():
    q = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(UserError, match="unknown implementation 'foo'"):
        linear_attention(q, q, q, implementation="foo")
    name = next(name for name in ("pallas_tpu", "pallas_gpu") if name not in available("linear_attention").names)
    with pytest.raises(CannotRun, match="cannot run") as caught:
        linear_attention(q, q, q, implementation=name)
    assert isinstance(caught.value, NotImplementedError)


def test_what_fits_is_let_through(monkeypatch):
    trainer = Trainer(tiny())
    fit.refuse_what_does_not_fit(trainer)
    least = fit.needed(trainer)
    assert least > 3 * 4 * sum(leaf.size for leaf in jax.tree.leaves(trainer.abstract_state()["params"]))
    batch = trainer.experiment.batch_size * trainer.experiment.data.seq_len * fit.BATCH_BYTES
    for memory, fits in ((least + batch, True), (least + batch - 1, False)):
        monkeypatch.setattr(fit, "host_memory", lambda memory=memory: memory)
        if fits:
            fit.refuse_what_does_not_fit(trainer)
        else:
            with pytest.raises(UserError, match="this machine has"):
                fit.refuse_what_does_not_fit(trainer)
    monkeypatch.setattr(fit, "device_memory", lambda: least - 1)
    with pytest.raises(UserError, match="each device has"):
        fit.refuse_what_does_not_fit(trainer)


def test_wandb_finds_a_key_where_wandb_looks(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not metrics._has_wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / "netrc").chmod(0o600)
    assert metrics._has_wandb_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org/api")
    assert not metrics._has_wandb_key()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert metrics._has_wandb_key()


# Ctrl-C.


@pytest.mark.parametrize(
    "command, moment", [("train", 0.0), ("train", 0.2), ("train", 0.7), ("compare", 0.4), ("list", 0.1)]
)
def test_ctrl_c_in_the_first_second(tmp_path, command, moment):
    """Lightning-AI/pytorch-lightning#19916: an interrupted training ended with exit code 0."""
    args = {"train": ["train", "quickstart"], "compare": ["compare", "titans_ablation"], "list": ["list"]}[command]
    code = "import sys\nfrom engrax import cli\nprint(flush=True)\nsys.exit(cli.main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()  # Python itself has started
    time.sleep(0.02 + moment)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    if command != "list" or process.returncode:  # `list` may have ended already
        assert (process.returncode, err.strip()) == (130, "engrax: interrupted")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("then", ["pass", "raise ImportError('swallowed') from None"])
def test_ctrl_c_inside_an_import_that_swallows_it(tmp_path, monkeypatch, capsys, then):
    """When an import turns KeyboardInterrupt into another error, or hides it, then the command still ends."""
    (tmp_path / "swallows.py").write_text(
        "import os, signal, time\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(0.1)\n"
        f"except BaseException as error:\n    {then}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "swallows", raising=False)

    def command(args):
        import swallows  # noqa: F401

        time.sleep(20)
        return 0

    monkeypatch.setitem(cli.COMMANDS, "list", command)
    before, started = signal.getsignal(signal.SIGINT), time.monotonic()
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "engrax: interrupted\n" and time.monotonic() - started < 10
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_in_a_comparison(tmp_path, monkeypatch):
    """When Ctrl-C stops its training, then the comparison ends with 130; another stop is a mistake."""
    pair = Comparison({"one": tiny(), "two": tiny()}, (1e-3, 1e-2, 1e-1))
    for interrupted, error in ((True, KeyboardInterrupt), (False, UserError)):
        stopped = loop.Result(runs.folder(tmp_path), 3, False, {}, interrupted=interrupted)
        monkeypatch.setattr(trials.loop, "train", lambda *args, stopped=stopped, **kwargs: stopped)
        with pytest.raises(error, match="the same command continues from there"):
            evals.compare(pair, tmp_path / "c", progress=False)


def test_which_signal_stopped_a_training():
    for number in (signal.SIGINT, signal.SIGTERM):
        with distributed.StopSignal() as stop:
            signal.raise_signal(number)
        assert stop.asked and stop.number == number


def test_the_exit_code_tells_how_a_training_ended(tmp_path, monkeypatch, capsys):
    for finished, interrupted, code in ((False, True, 130), (False, False, 143), (True, False, 0)):
        result = loop.Result(runs.folder(tmp_path), 3, finished, {}, interrupted)
        monkeypatch.setattr(loop, "train", lambda *args, result=result, **kwargs: result)
        assert cli.main(["train", "quickstart", "--run-dir", str(tmp_path)]) == code
    for error, code in ((Diverged("not finite"), 4), (Damaged("no sound checkpoint"), 3), (UserError("a mistake"), 2)):
        monkeypatch.setattr(loop, "train", lambda *args, error=error, **kwargs: (_ for _ in ()).throw(error))
        assert cli.main(["train", "quickstart", "--run-dir", str(tmp_path)]) == code
        assert capsys.readouterr().err == f"engrax: {error}\n"


def test_the_public_calls_refuse_alike(tmp_path):
    (tmp_path / "file").write_text("")
    for call in (
        lambda: runs.folder(""),
        lambda: loop.check(tiny(), runs.folder(tmp_path / "file")),
        lambda: evals.evaluate(tmp_path / "file"),
        lambda: tiny(seed=-3),
        lambda: tiny(batch_size=10**12),
        lambda: metrics.read(_metrics(tmp_path, "[1]\n{}\n")),
    ):
        with pytest.raises(UserError):
            call()


def _metrics(folder: Path, text: str) -> Path:
    (folder / "metrics.jsonl").write_text(text + json.dumps({"step": 1, "loss": 1.0}) + "\n")
    return folder
