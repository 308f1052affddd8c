"""Comparisons that are not whole: a look with one seed, several tasks, what is missing, and finished runs."""

import dataclasses
import json

import numpy as np
import pytest

import engrax
from engrax import cli, evals
from engrax.data import MQAR
from engrax.errors import Diverged, UserError
from engrax.evals import Comparison, finished_runs, trials
from engrax.evals.trials import Score
from engrax.tests.test_compare import RATES, tiny
from engrax.train import runs


@pytest.fixture
def trained(monkeypatch):
    """The seeds of the trials that were run. Nothing is trained: two heads score 0.9 and one 0.5; three diverge."""
    done, scores = [], {}

    def train(experiment, directory, progress):
        heads = experiment.model.mixers[0].heads
        done.append(experiment.seed)
        runs.prepare(directory, experiment)
        if heads == 3:
            raise Diverged("not finite")
        scores[str(directory)] = {1: 0.5, 2: 0.9}[heads] + experiment.seed / 1000
        return type("Result", (), {"finished": True})()

    def measure(directory, rows=None):
        return Score(np.full(4, scores[str(directory)]), np.ones(4))

    monkeypatch.setattr(trials.loop, "train", train)
    monkeypatch.setattr(trials.loop, "check", lambda experiment, folder: None)
    monkeypatch.setattr(trials, "measure", measure)
    return done


def pair(**fields) -> Comparison:
    return Comparison({"one": tiny(1), "two": tiny(2)}, RATES, **fields)


def test_one_seed_is_a_look_without_verdicts(tmp_path, trained):
    """When --seeds 1 is given, then the table and the plot have no verdict; three seeds continue from there."""
    look = engrax.compare(pair(claims=(evals.Claim("two", "one", "x"),)), tmp_path / "c", seeds=1)
    assert [line.verdict for line in look.lines] == [None, "no verdict"] and not look.claims
    assert look.lines[1].difference is None and "| no verdict |" in look.markdown and len(trained) == 8
    assert "no verdict where a side has fewer than 3 seeds" in look.markdown
    whole = engrax.compare(pair(), tmp_path / "c")
    assert [line.verdict for line in whole.lines] == [None, "better"] and len(trained) == 12


@pytest.mark.deep
def test_every_task_has_its_table(tmp_path, trained):
    """When a comparison names tasks, then each replaces its fields in all experiments and has a table and a plot."""
    other = MQAR(seq_len=16, num_pairs=3, vocab_size=16, train_examples=64, validation_examples=16)
    found = engrax.compare(pair(tasks={"few": {}, "more pairs": {"data": other}}), tmp_path)
    assert list(found.tables) == ["few", "more pairs"] and "## more pairs\n\n| |" in found.markdown.replace(
        "|  |", "| |"
    )
    assert [line.verdict for line in found.tables["more pairs"].lines] == [None, "better"]
    assert runs.open_run(tmp_path / "more_pairs" / "one" / "lr_0.01_seed_0").experiment.data.num_pairs == 3
    assert json.loads((tmp_path / "comparison.json").read_text())["tasks"]["few"]["lines"][1]["verdict"] == "better"
    assert (tmp_path / "comparison_more_pairs.png").exists() and len(trained) == 24


def test_what_is_missing_is_named_and_the_rest_is_judged(tmp_path, trained):
    """When one experiment diverges everywhere, then the others have their table; without a baseline no verdict."""
    three = Comparison({"one": tiny(1), "two": tiny(2), "wild": tiny(3)}, RATES)
    found = engrax.compare(three, tmp_path / "a")
    assert [line.verdict for line in found.lines] == [None, "better"]
    assert list(found.missing) == ["wild"] and "Not in the table: wild, it diverged at every learning" in found.markdown
    turned = Comparison({"wild": tiny(3), "one": tiny(1), "two": tiny(2)}, RATES)
    found = engrax.compare(turned, tmp_path / "a")
    assert [line.verdict for line in found.lines] == ["no verdict"] * 2
    with pytest.raises(UserError, match="no experiment has all its trials.*'one': 3 of 3 trials are missing"):
        engrax.compare(pair(), tmp_path / "b", minutes=0)


def test_finished_runs_are_compared_as_they_are(tmp_path, trained, capsys):
    """When three seeds of two models are finished, then they have a verdict; with fewer they have none."""
    paths = []
    for heads in (1, 2):
        for seed in range(3):
            paths.append(tmp_path / f"heads_{heads}" / f"seed_{seed}")
            trials.loop.train(tiny(heads, seed=seed), paths[-1], False)
    assert cli.main(["compare", *map(str, paths), "--folder", str(tmp_path / "table")]) == 0
    out = capsys.readouterr().out
    assert "| heads_2/seed_0 |" in out and "| better |" in out and "6 finished runs" in out
    assert (tmp_path / "table" / "comparison.png").exists()
    assert cli.main(["compare", *map(str, paths[:4])]) == 0
    assert "| no verdict |" in capsys.readouterr().out
    trials.loop.train(tiny(2, steps=5), tmp_path / "longer", False)
    assert "the experiments differ in steps" in engrax.compare([paths[0], tmp_path / "longer"]).markdown
    other = dataclasses.replace(tiny(2), data=dataclasses.replace(tiny().data, num_pairs=3))
    trials.loop.train(other, tmp_path / "other", False)
    for args, told in (
        ([paths[0], tmp_path / "other"], "differ in data.num_pairs: no comparison"),
        (paths[:3], "at least two experiments"),
        ([*paths, paths[0]], "the same training with the same seed"),
        ([paths[0], tmp_path / "none"], "no run folder at"),
        ([*paths, "--steps", "3"], "--steps cannot change them"),
    ):
        assert cli.main(["compare", *map(str, args)]) == 2
        assert told in capsys.readouterr().err


def test_runs_on_files_that_changed_are_not_compared(tmp_path):
    """When two runs name the same data and their contents differ, then there is no comparison."""
    one, two = (runs.Run(runs.folder(tmp_path / digest), tiny(), {"data_digest": digest}) for digest in "ab")
    finished_runs._refuse_other_data(one, one)
    with pytest.raises(UserError, match="differ in the content of the data: no comparison"):
        finished_runs._refuse_other_data(one, two)
