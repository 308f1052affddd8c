"""Several runs on one page."""

import csv

import numpy as np
import pytest
from etils import epath

from engrax import cli
from engrax.errors import UserError
from engrax.evals import plots
from engrax.evals.evaluation import Results
from engrax.evals.side_by_side import side_by_side
from engrax.tests.test_cli import mistake


def result(path, scores, lines, stream=None):
    """A finished evaluation with scores of a task by length, two depths each."""
    accuracy = {n: {"value": v, "low": v - 0.1, "high": v + 0.1} for n, v in scores.items()}
    found = {
        "depths": ["0 %", "100 %"],
        "lengths": list(scores),
        "scores": [list(scores.values())] * 2,
        "mid_sequence_drop": {str(n): None for n in scores},
    }
    cells = [{"values": {"seq_len": n, "depth": d}, "accuracy": accuracy[n]} for n in scores for d in (0, 100)]
    evaluations = {"tasks": {"tasks": {"niah_single_1": {"cells": cells, "map": found}}}}
    if stream:
        evaluations["stream"] = {"by_length": {"model": stream}}
    data = dict(run=epath.Path(path).name, step=7, commit="abc", data_digest="d" * 64, device="cpu", date="2026-01-01")
    data |= dict(warnings=["old data"], seeds={"experiment": 3}, config={}, evaluations=evaluations)
    return Results(epath.Path(path) / "evals" / "step_7", data, lines)


def test_runs_stand_side_by_side(tmp_path, monkeypatch):
    drawn = []
    lines = plots.lines
    monkeypatch.setattr(plots, "lines", lambda *args, **kw: drawn.append(args[2]) or lines(*args, **kw))
    points = [dict(tokens=n, value=v, low=v, high=v) for n, v in ((64, 2.0), (128, 1.5))]
    a = result(tmp_path / "x" / "run", {64: 0.9, 128: 0.5}, [("score", "0.9"), ("only a", "1")], points)
    b = result(tmp_path / "y" / "run", {64: 0.8, 128: 0.7}, [("score", "0.8")], points)
    found = side_by_side([a, b], tmp_path / "page")
    table = list(csv.reader((tmp_path / "page" / "side_by_side.csv").open()))
    assert table == [["", "x/run, step 7", "y/run, step 7"], ["score", "0.9", "0.8"], ["only a", "1", ""]]
    ((first, second),) = drawn
    assert (first["name"], first["x"], first["value"]) == ("x/run", [64, 128], [0.9, 0.5])
    assert (second["name"], second["value"]) == ("y/run", [0.8, 0.7])
    for name in ("niah_single_1_by_length", "niah_single_1_map", "loss_by_length"):
        assert (tmp_path / "page" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = found.report.read_text()
    assert "Runs side by side" in page and "x/run: old data" in page and "score by depth and length" in page
    assert "only a" in found.summary() and str(found.report) in found.summary()
    assert np.isfinite(first["low"]).all()


def test_mistakes(tmp_path, capsys):
    one = result(tmp_path / "run", {64: 0.9}, [])
    with pytest.raises(UserError, match="named twice"):
        side_by_side([one, one], tmp_path / "page")
    with pytest.raises(UserError, match="name two or more"):
        side_by_side([one], tmp_path / "page")
    assert "name a second one" in mistake(capsys, "evaluate", str(tmp_path / "run"), "--folder", "x")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    assert "further runs" in capsys.readouterr().out
