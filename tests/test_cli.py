"""The command line: what a user types, and one line and exit code 2 for every mistake."""

import json

import pytest

from engrax import cli
from engrax.train import experiment as experiments
from engrax.train import runs


def mistake(capsys, *args: str) -> str:
    """The one line that a mistake prints."""
    assert cli.main(args) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("engrax: "), captured.err
    return lines[0]


@pytest.fixture
def run_folder(tmp_path):
    """A run folder of the quickstart before its first checkpoint."""
    from engrax.configs import quickstart

    runs.prepare(tmp_path / "run", quickstart.config())
    return tmp_path / "run"


@pytest.mark.parametrize(
    "args, told",
    [
        (["trian", "quickstart"], "did you mean 'train'?"),
        (["train"], "needs a CONFIG first"),
        (["train", "quickstrat"], "did you mean 'quickstart'?"),
        (["train", "no/such/file.py"], "no file no/such/file.py"),
        (["train", "quickstart", "--model.mixers.0.head", "8"], "did you mean 'model.mixers.0.heads'?"),
        (["train", "quickstart", "--optimiser.learning-rate", "1"], "did you mean 'optimizer.learning-rate'?"),
        (["train", "quickstart", "--steps", "many"], "--steps"),
        (["train", "quickstart", "--optimizer.schedule", "wsd"], "such as --optimizer.schedule.warmup-steps"),
        (["train", "quickstart", "--optimizer.schedule.warmup-steps", "-1"], "warmup_steps=-1 must be at least 0"),
        (["train", "quickstart", "--optimizer.b1", "1"], "optimizer.b1=1.0 must be at least 0 and below 1"),
        (["train", "quickstart", "--steps", "0"], "steps=0 must be at least 1"),
        (["train", "quickstart", "--model.mixers.0.head-dim", "3"], "head_dim=3 is odd"),
        (["train", "quickstart", "--model.remat", "ful"], "did you mean 'full'?"),
        (["train", "quickstart", "--batch-size", "6", "--optimizer.accumulate", "4"], "does not divide"),
        (["train", "quickstart", "--parallel.fsdp", "3"], "does not divide the 1 devices"),
        (["train", "quickstart", "--parallel.data", "2"], "needs 2 devices, but 1 are here"),
        (["train", "quickstart", "--parallel.tensor", "2"], "set --parallel.tensor to a divisor of 1"),
        (["train", "quickstart", "--parallel.sequence", "0"], "parallel.sequence=0 must be at least 1"),
        (["train", "quickstart", "--model.vocab-size", "100"], "smaller than the data's 256 tokens"),
        (["evaluate", "no/such/run"], "no run folder at no/such/run"),
        (["generate", "no/such/run", "--prompt", "x"], "no run folder at no/such/run"),
        (["generate", "run"], "--prompt"),
        (["generate", "run", "--prompt", "x", "--temperature", "nan"], "temperature=nan"),
        (["generate", "run", "--prompt", "x", "--top-p", "0"], "top_p=0.0"),
        (["generate", "run", "--prompt", "x", "--seed", "-1"], "seed=-1"),
        (["export", "no/such/run", "out"], "no run folder at no/such/run"),
        (["train", "quickstart", "--init-from", "no/such/folder"], "no/such/folder"),
        (["describe", "nothing"], "unknown config 'nothing'"),
        (["compare", "titans_ablaton"], "did you mean 'titans_ablation'?"),
        (["compare", "titans_ablation", "--seeds", "2"], "at least three"),
        (["compare", "titans_ablation", "--stps", "2"], "did you mean 'steps'?"),
    ],
)
def test_a_mistake_is_one_line(capsys, tmp_path, monkeypatch, args, told):
    monkeypatch.chdir(tmp_path)
    assert told in mistake(capsys, *args)
    assert not list(tmp_path.iterdir()), "a mistake left something behind"


def test_an_empty_text_folder(capsys, tmp_path):
    (tmp_path / "texts").mkdir()
    config = tmp_path / "mine.py"
    config.write_text(
        "from engrax.data import TextFolder\nfrom engrax.models import LanguageModelConfig\n"
        "from engrax.train import Experiment\n"
        f"def config():\n    return Experiment(LanguageModelConfig(), TextFolder(path={str(tmp_path / 'texts')!r}))\n"
    )
    assert "texts" in mistake(capsys, "train", str(config), "--run-dir", str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_config_file_that_does_not_run(capsys, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text("x = 1\ny = x / 0\n")
    assert "mine.py, line 2 does not run: ZeroDivisionError" in mistake(capsys, "train", str(config))
    config.write_text("def config(:\n")
    assert "line 1 does not run: SyntaxError" in mistake(capsys, "train", str(config))
    config.write_text("def config(): return 3\n")
    assert "must return an engrax.train.Experiment" in mistake(capsys, "train", str(config))


def test_a_run_folder_from_another_config(capsys, run_folder):
    told = mistake(capsys, "train", "quickstart", "--run-dir", str(run_folder), "--model.dim", "64", "--seed", "7")
    assert "differs in model.dim, seed" in told
    # Nothing is trained yet, so the steps may change: that alone is no difference.
    told = mistake(capsys, "train", "quickstart", "--run-dir", str(run_folder), "--steps", "7", "--seed", "7")
    assert "differs in seed;" in told


def test_a_folder_that_is_no_run(capsys, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    assert "is not empty and holds no run" in mistake(capsys, "train", "quickstart", "--run-dir", str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    assert "holds no config.json" in mistake(capsys, "evaluate", str(tmp_path))


@pytest.mark.parametrize(
    "damage, told",
    [
        (lambda text: text[: len(text) // 2], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 9'), "format version 9"),
        (lambda text: text.replace('"format_version": 2', '"format_version": 1'), "a run of engrax 0.1.0"),
        (lambda text: text.replace('"steps"', '"stesp"'), "stesp is no field of Experiment; did you mean 'steps'?"),
        (lambda text: text.replace("mixer:titans", "mixer:titan"), "did you mean 'titans'?"),
        (lambda text: text.replace('"seed": 0', '"seed": "zero"'), "seed='zero' is not of the type wanted: int"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_a_damaged_config(capsys, run_folder, damage, told, command):
    path = run_folder / "config.json"
    text = damage(path.read_text())
    path.write_text(text)
    args = (
        ["evaluate", str(run_folder)]
        if command == "evaluate"
        else ["train", "quickstart", "--run-dir", str(run_folder)]
    )
    assert told in mistake(capsys, *args)
    assert path.read_text() == text


def test_changed_data_is_refused(capsys, run_folder):
    path = run_folder / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_digest": "0" * 64}))
    assert "has changed since it was started" in mistake(capsys, "train", "quickstart", "--run-dir", str(run_folder))


def test_evaluators_are_named_with_commas(capsys, run_folder):
    told = mistake(capsys, "evaluate", str(run_folder), "--only", "validation, steam")
    assert "unknown evaluator 'steam'; did you mean 'stream'?" in told


def test_a_run_without_checkpoint(capsys, run_folder):
    assert "holds no checkpoint" in mistake(capsys, "evaluate", str(run_folder))


@pytest.mark.smoke
def test_a_run_that_began_anew_has_no_layout_to_export_to(capsys, run_folder):
    assert "did not begin from a published checkpoint" in mistake(capsys, "export", str(run_folder), "out")


def test_list_names_everything(capsys):
    assert cli.main(["list"]) == 0
    out = capsys.readouterr().out
    for name in (
        "quickstart",
        "mqar_titans",
        "lm1b_titans",
        "attention",
        "titans",
        "language_model",
        "stdlib_text",
        "mqar",
    ):
        assert f"  {name} " in out


def test_describe_prints_the_costs_of_the_overridden_config(capsys):
    assert cli.main(["describe", "quickstart"]) == 0
    before = capsys.readouterr().out
    assert cli.main(["describe", "quickstart", "--model.dim", "256"]) == 0
    after = capsys.readouterr().out
    for word in ("parameters", "FLOPs per token", "recurrent state per sequence", "optimizer state"):
        assert word in before and word in after
    assert before != after


@pytest.mark.parametrize("command", ["train", "evaluate", "generate", "describe", "list"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"engrax {command}" in capsys.readouterr().out.split("\nexample:\n")[1]


def test_help_of_a_config_lists_its_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "quickstart", "--help"])
    assert stop.value.code == 0
    assert "--model.mixers.1.chunk-size" in capsys.readouterr().out


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["quickstart", "mqar_titans", "mqar_attention", "lm1b_titans"])
def test_configs_travel_as_json(name):
    from engrax.configs import find

    experiment = find(name).experiment
    assert experiments.from_json(experiments.to_json(experiment)) == experiment
