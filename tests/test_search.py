"""`engrax sweep`: the settings of a grid and of a random search, their table and plot, and the command to run again."""

import csv
import json

import numpy as np
import pytest

import engrax
from engrax import cli, flags
from engrax.errors import Diverged, UserError
from engrax.evals import search, trials
from engrax.evals.search import Range
from engrax.evals.trials import Score
from engrax.tests.test_compare import tiny
from engrax.train import runs

CONFIG = "from engrax.tests.test_compare import tiny\ndef config():\n    return tiny()\n"


@pytest.fixture
def trained(monkeypatch):
    """(learning rate, width, seed) of the trials that were run. Nothing is trained: rate 1 diverges, and the score is
    the width's share of 64, less a tenth of the seed."""
    done, scores = [], {}

    def train(experiment, directory, progress):
        done.append((experiment.optimizer.learning_rate, experiment.model.dim, experiment.seed))
        runs.prepare(directory, experiment)
        if experiment.optimizer.learning_rate == 1:
            raise Diverged("not finite")
        scores[str(directory)] = experiment.model.dim / 64 - experiment.seed / 10
        return type("Result", (), {"finished": True})()

    monkeypatch.setattr(trials.loop, "train", train)
    monkeypatch.setattr(trials.loop, "check", lambda experiment, folder: None)
    monkeypatch.setattr(trials, "measure", lambda d: Score(np.full(4, scores[str(d)]), np.ones(4)))
    return done


def test_a_grid_is_every_combination_and_ends_in_a_table(tmp_path, trained, capsys):
    """When a grid of two fields is run with two seeds, then files hold its means and the best setting's command."""
    (tmp_path / "mine.py").write_text(CONFIG)
    args = ["sweep", str(tmp_path / "mine.py"), "--grid", "optimizer.learning-rate=0.1,1", "--grid", "model.dim=16,32"]
    args += ["--seeds", "2", "--steps", "3", "--folder", str(tmp_path / "s")]
    assert cli.main(args) == 0
    assert trained == [(rate, dim, seed) for seed in (0, 1) for rate in (0.1, 1) for dim in (16, 32)]
    out = capsys.readouterr().out
    assert "| **0.1** | **32** | **0.4500** | **0.4000** | **0.5000** | **2 of 2** |" in out
    assert "| 1.0 | 16 | diverged |  |  | 0 of 2 (2 diverged) |" in out
    data = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert data["settings"][0]["seeds"] == {"0": 0.25, "1": 0.15} and data["settings"][2]["score"] is None
    words = data["rerun"].split()
    assert words[:3] == ["engrax", "train", str(tmp_path / "mine.py")]
    best = flags.override(tiny(), words[3:], "engrax train mine")
    assert (best.steps, best.model.dim, best.optimizer.learning_rate) == (3, 32, 0.1)
    rows = list(csv.reader((tmp_path / "s" / "sweep.csv").open()))
    assert rows[1][:3] == ["0.1", "16", "0.2"] and len(rows) == 5
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(args) == 0 and len(trained) == 8, "a second call reads"


def test_a_random_search_draws_the_same_after_an_interruption(tmp_path, trained):
    """When more draws are asked for later, then the first ones are the same and are not run again."""
    ranges = {"optimizer.learning_rate": (1e-4, 1e-2, True), "model.dim": (16, 64)}
    first = engrax.sweep(tiny(), tmp_path / "s", random=ranges, trials=3)
    before = list(trained)
    more = engrax.sweep(tiny(), tmp_path / "s", random=ranges, trials=5)
    assert trained[:3] == before and len(trained) == 5 == len(set(trained))
    assert all(setting.values in [other.values for other in more.settings] for setting in first.settings)
    assert [s.score for s in more.settings] == sorted((s.score for s in more.settings), reverse=True)
    assert more.best is more.settings[0]
    for rate, dim, _ in trained:
        assert 1e-4 <= rate <= 1e-2 and float(f"{rate:.4g}") == rate and type(dim) is int and 16 <= dim <= 64


def test_the_ranges_are_uniform():
    """When many values are drawn, then they fill the range evenly, in the logarithm where that is asked for."""
    rng = np.random.default_rng(0)
    logs = np.log10([Range(1e-4, 1.0, log=True).draw(rng) for _ in range(2000)])
    assert np.quantile(logs, [0.25, 0.5, 0.75]) == pytest.approx([-3, -2, -1], abs=0.15)
    counts = np.bincount([Range(1, 4).draw(rng) for _ in range(2000)], minlength=5)
    assert counts[0] == 0 and counts[1:].min() > 400


def test_no_setting_is_best_without_all_its_seeds(tmp_path, trained):
    """When no time is left, then the table says what is missing, and nothing is called the best."""
    found = engrax.sweep(tiny(), tmp_path / "s", grid={"model.dim": (16, 32)}, seeds=2, minutes=0)
    assert found.best is None and len(found.missing) == 4 and not trained
    assert "| 16 | missing |  |  | 0 of 2 (2 missing) |" in found.markdown and "Train it again" not in found.markdown


@pytest.mark.parametrize(
    "args, told",
    [
        (["--grid", "optimizer.learning-rat=1,2"], "learning-rate"),
        (["--grid", "model.dim=8,wide"], "wide"),
        (["--grid", "model=8"], "is a group of fields"),
        (["--grid", "model.dim"], "is not of the form"),
        (["--random", "model.dim=8", "--trials", "2"], "is no range"),
        (["--random", "model.dim=16:8", "--trials", "2"], "LOW below HIGH"),
        (["--random", "model.dim=8:16"], "needs a number of trials"),
        (["--grid", "model.dim=8", "--random", "model.dim=8:16", "--trials", "2"], "swept twice"),
        (["--grid", "seed=1,2"], "counted by --seeds"),
        ([], "nothing is swept"),
        (["--grid", "model.dim=8", "--minutes", "-1"], "must be a number of minutes"),
        (["--grid", "model.dim=8", "--processes", "0"], "must be at least 1"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, args, told):
    (tmp_path / "mine.py").write_text(CONFIG)
    assert cli.main(["sweep", str(tmp_path / "mine.py"), *args, "--folder", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not (tmp_path / "s").exists()


def test_the_command_of_a_setting_and_its_folder():
    assert search.flags_of({"model.tie_embeddings": False, "data.path": "a b"}) == [
        "--model.no-tie-embeddings",
        "--data.path",
        "a b",
    ]
    assert search.name_of({"model.dim": 8, "optimizer.b1": 0.5}) == "dim=8,b1=0.5"
    assert search.name_of({"model.a.x": 1, "model.b.x": 2}) == "model.a.x=1,model.b.x=2"
    names = [search.name_of({"data.path": path}) for path in ("../x", "__/x", "/" * 300)]
    assert len(set(names)) == 3 and all("/" not in name and len(name) < 130 for name in names)
    with pytest.raises(UserError, match="no value"):
        search.settings_of({"model.dim": ()}, {}, None)
