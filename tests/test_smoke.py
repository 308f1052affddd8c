"""The whole program once, small: train, resume, evaluate, sample, describe. Run on the lowest versions too."""

import json

import pytest

from engrax import cli

pytestmark = pytest.mark.smoke

CONFIG = """
import dataclasses
from engrax.configs import quickstart
from engrax.train import AdamWConfig, ConstantConfig

def config():  # a constant rate, so that the run can be continued for more steps
    return dataclasses.replace(quickstart.config(), optimizer=AdamWConfig(schedule=ConstantConfig(warmup_steps=2)))
"""
TINY = (
    *("--batch-size", "2", "--data.seq-len", "32", "--model.dim", "32", "--model.repeat", "1"),
    *("--model.mixers.0.heads", "2", "--model.mixers.1.heads", "2", "--model.mixers.1.chunk-size", "8"),
    *("--optimizer.b2", "0.9", "--optimizer.schedule.warmup-steps", "1", "--eval.batches", "1", "--log.every", "1"),
)


def test_train_resume_evaluate_generate(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # run folders are mostly named relatively
    (tmp_path / "tiny.py").write_text(CONFIG)
    for steps in ("2", "3"):
        assert cli.main(["train", "tiny.py", *TINY, "--steps", steps, "--run-dir", "runs/tiny"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    assert all(0 < row["loss"] < 10 for row in rows if "loss" in row)

    assert cli.main(["evaluate", "runs/tiny", "--batches", "1"]) == 0
    assert list(tmp_path.glob("runs/tiny/evals/**/report.html"))

    capsys.readouterr()
    assert cli.main(["generate", "runs/tiny", "--prompt", "def ", "--tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_describe_and_list(capsys):
    assert cli.main(["describe", "quickstart", *TINY]) == 0
    assert cli.main(["list"]) == 0
    assert "quickstart" in capsys.readouterr().out
