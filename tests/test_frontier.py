"""The frontier: which cells it has, how trials become points, its files, and its command."""

import csv
import json
import zlib

import numpy as np
import pytest

import engrax
from engrax import cli
from engrax.errors import UserError
from engrax.evals import frontier, frontier_report
from engrax.evals.sweep import Outcome, Score
from engrax.train.cost import costs

PLUGIN = '''
"""A memory with one integer setting: a running sum."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import engrax
from engrax.layers.common.modules import projection


@engrax.register("running_sum")
@dataclasses.dataclass(frozen=True)
class RunningSumConfig(engrax.MixerConfig):
    """y_t = (x_1 W + ... + x_t W) V."""

    channels: int = 4

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return RunningSum(self, dim, rngs=rngs)

    def flops_per_token(self, dim, seq_len):
        return 4 * dim * self.channels


class RunningSum(nnx.Module):
    def __init__(self, config, dim, *, rngs):
        self.channels = config.channels
        self.write = projection(dim, config.channels, ("embed", "heads"), rngs=rngs)
        self.read = projection(config.channels, dim, ("heads", "embed"), rngs=rngs)

    def init_state(self, batch_size):
        return jnp.zeros((batch_size, self.channels))

    def __call__(self, x, state=None, segment_ids=None):
        state = self.init_state(len(x)) if state is None else state
        sums = state[:, None] + jnp.cumsum(self.write(x), axis=1)
        return self.read(sums), sums[:, -1]
'''


def small(mixers, sizes=(1024, 4096), seeds=3, **fields):
    """A frontier whose trials would take a second each."""
    found = frontier.setting("mqar", mixers, "quick")
    return frontier.Frontier(found.experiment, tuple(mixers), sizes, found.learning_rates, seeds, **fields)


@pytest.fixture
def pretended(monkeypatch):
    """No training: a score is a function of the trial's name, better at the middle rate and with larger states."""
    seen = []

    def run(trials, folder, *, processes=1, minutes=None, progress=True, later=0):
        seen.append([trial.name for trial in trials])
        scores, missing = {}, {}
        for trial in trials:
            rate, counts = trial.settings["optimizer.learning_rate"], np.full(50, 8.0)
            level = (0.4 if "4096" in trial.name else 0.2) + 0.3 * ("delta" in trial.name) + 0.1 * (rate == 0.01)
            rng = np.random.default_rng(zlib.crc32(trial.name.encode()))
            diverged = trial.name.startswith("gla/1024") and rate == 0.03
            sums = None if diverged else rng.binomial(8, level, 50).astype(float)
            scores[trial.name] = Score(sums, None if diverged else counts, seconds=1.0)
        if minutes == 0:
            scores, missing = {}, {trial.name: "it would have ended after the 0 minutes" for trial in trials}
        return Outcome(scores, missing)

    monkeypatch.setattr(frontier.sweep, "run", run)
    return seen


def test_cells_differ_in_their_mixer_alone():
    table, left_out = frontier.cells(small(["attention", "gla", "hopfield_layer", "prefix_linear_attention"]))
    # Attention also stands with a cache of the whole row; what cannot take part says why.
    assert [(cell.mixer, cell.size) for cell in table] == [
        *(("attention", size) for size in ("1024 bytes", "4096 bytes", "whole row")),
        *(("gla", size) for size in ("1024 bytes", "4096 bytes")),
        ("hopfield_layer", "only size"),
    ]
    assert list(left_out) == ["prefix_linear_attention"] and "not causal" in left_out["prefix_linear_attention"]
    for cell in table:
        (mixer,) = cell.experiment.model.mixers
        assert mixer.heads == 2 and getattr(mixer, "conv_width", 4) == 4 and not getattr(mixer, "output_gate", False)
        assert cell.state_bytes == costs(cell.experiment)["state_bytes_per_sequence"]["total"]
        assert cell.experiment.data == table[0].experiment.data and cell.experiment.steps == table[0].experiment.steps


def test_a_window_of_the_whole_row_is_no_size_of_its_own():
    """When a size gives attention a window of the 64 tokens of a row, then only the cache of the whole row stands."""
    table, left_out = frontier.cells(small(["attention"], sizes=(1024, 32768)))
    assert [cell.size for cell in table] == ["1024 bytes", "whole row"]
    assert "holds the whole row" in left_out["attention at 32768 bytes"]


def test_points_are_of_judged_seeds_at_the_best_rate(pretended, tmp_path):
    settings = small(["linear_attention", "deltanet", "gla"])
    found = frontier_report.frontier(settings, tmp_path, command="engrax frontier")
    grid, judged = pretended
    assert len(grid) == 6 * 3 and all(name.endswith("seed_0") for name in grid)
    assert len(judged) == 6 * 3 and all("lr_0.01_seed_" in name and "seed_0" not in name for name in judged)
    points = {(p.cell.mixer, p.cell.size): p for p in found.points}
    assert points["deltanet", "4096 bytes"].verdict == "better"
    assert points["linear_attention", "4096 bytes"].verdict is None  # the baseline
    assert points["deltanet", "1024 bytes"].best and not points["gla", "4096 bytes"].best
    assert np.isnan(points["gla", "1024 bytes"].grid[0.03])
    assert "2 layers of width" in found.markdown
    assert not found.missing and "Holm" in found.markdown and frontier_report.LOOK not in found.markdown

    # The files have the same numbers.
    data = json.loads((tmp_path / "frontier.json").read_text())
    rows = list(csv.DictReader((tmp_path / "frontier.csv").open()))
    assert data["finished"] and len(data["points"]) == len(rows) == 6
    for point, row in zip(data["points"], rows):
        assert float(row["accuracy"]) == point["accuracy"] == pytest.approx(np.mean(point["seeds"]))
        assert point["low"] <= point["accuracy"] <= point["high"]
    assert (tmp_path / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    page = (tmp_path / "frontier.html").read_text()
    assert "deltanet" in page and "data:image/png" in page


def test_fewer_seeds_are_a_look_and_a_short_budget_is_told(pretended, tmp_path):
    found = frontier_report.frontier(small(["linear_attention", "deltanet"], seeds=1), tmp_path)
    assert frontier_report.LOOK in found.markdown and {point.verdict for point in found.points} == {None}
    found = frontier_report.frontier(small(["linear_attention", "deltanet"], seeds=1), tmp_path, minutes=0)
    assert not found.points and len(found.missing) == 4 and "Unfinished: 4 of 4" in found.markdown


def test_a_users_mixer_takes_part(pretended, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(PLUGIN)
    command = ["frontier", "--mixers", "running_sum", "--plugin", str(tmp_path / "mine.py"), "--sizes", "512,2048"]
    assert cli.main([*command, "--folder", str(tmp_path / "out"), "--data.num-pairs", "4"]) == 0
    points = json.loads((tmp_path / "out" / "frontier.json").read_text())["points"]
    assert [(p["mixer"], p["state_bytes"]) for p in points] == [("running_sum", 1024), ("running_sum", 4096)]
    assert "running_sum" in capsys.readouterr().out
    # And without being named, beside the preset's.
    assert {"running_sum", "titans"} < set(frontier.setting("mqar").mixers)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mqra"], "unknown task 'mqra'; did you mean 'mqar'?"),
        (["stdlib_text"], "unknown task"),
        (["--mixers", "deltanet,delta"], "unknown mixer 'delta'"),
        (["--mixers", "prefix_linear_attention"], "no mixer is left"),
        (["--preset", "fast"], "unknown preset 'fast'"),
        (["--sizes", "0"], "at least 1"),
        (["--minutes", "-1"], "must be a number of minutes, 0 or more"),
        (["--data.pairs", "3"], "no field --data.pairs"),
    ],
)
def test_mistakes_end_before_anything_is_trained(arguments, told, pretended, tmp_path, capsys):
    assert cli.main(["frontier", *arguments, "--folder", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err.strip()
    assert told in err and len(err.splitlines()) == 1 and not pretended


def test_a_frontier_refuses_what_is_no_comparison():
    found = frontier.setting("mqar")
    with pytest.raises(UserError, match="three rates"):
        frontier.Frontier(found.experiment, ("gla",), (1024,), (1e-3, 1e-2))
    with pytest.raises(UserError, match="each once"):
        frontier.Frontier(found.experiment, ("gla", "gla"), (1024,), found.learning_rates)


@pytest.mark.long
def test_a_frontier_is_trained_and_continues(tmp_path, capsys):
    fields = dict(steps=2, batch_size=2, data__validation_examples=64, data__num_pairs=2)
    options = dict(mixers=["linear_attention"], sizes=[1024], folder=tmp_path / "out", **fields)
    found = engrax.frontier(**options)
    (point,) = found.points
    assert 0 <= point.accuracy.value <= 1 and point.tokens_per_second > 0 and not found.missing
    assert "[3/3]" in capsys.readouterr().err
    again = engrax.frontier(**options, minutes=0)  # everything is read, nothing trained
    assert again.points[0].accuracy == point.accuracy and again.markdown == found.markdown
