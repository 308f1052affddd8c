"""Cards: their verdicts, their pages, their states, and the presets that come with engrax."""

import dataclasses
import functools
import json
import math
import types

import numpy as np
import pytest
from etils import epath

import engrax
from engrax import cli, configs
from engrax.errors import UserError
from engrax.evals import Claim, claim_report, claims, trials, verdicts
from engrax.evals.claims import Card, Compared, Contrast, Finding, Found, Measured, Options
from engrax.evals.trials import Score
from engrax.evals.verdicts import Interval
from engrax.tests.test_compare import RATES, pair, scored, text, tiny
from engrax.train import AdamWConfig, CosineConfig, runs

TEXTS = "Paper [1] says 2.", "Here we try 1.", "Above 0."
QUIET = Options(progress=False, command="engrax reproduce x")


def by(**values):
    """Measurements "m" of every seed, by experiment."""
    return {name: [{"m": value} for value in each] for name, each in values.items()}


def test_intervals_are_students_and_welchs():
    from scipy import stats

    a, b = np.array([0.3, 0.35, 0.42]), np.array([0.1, 0.05, 0.31, 0.2])
    for samples, test in (((a,), stats.ttest_1samp(a, 0)), ((a, b), stats.ttest_ind(a, b, equal_var=False))):
        found, chance = claims.t_interval(samples)
        wanted = test.confidence_interval()
        assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
        assert chance == pytest.approx(test.pvalue)
    assert claims.t_interval([np.ones(3)]) == (Interval(1.0, 1.0, 1.0), 0.0)
    assert math.isnan(claims.t_interval([np.ones(1)])[0].low)


def test_contrasts_follow_their_intervals():
    """Positive, negative, unclear; of one experiment by seed; against a number; of an experiment that is missing."""
    values = by(high=[0.9, 0.91, 0.92], low=[0.1, 0.12, 0.11], wild=[0.0, 1.0, 0.6])
    values["high"] = [found | {"n": found["m"] - 0.01} for found in values["high"]]
    contrasts = [
        Contrast("up", ("high", "m"), ("low", "m")),
        Contrast("down", ("low", "m"), ("high", "m")),
        Contrast("unclear", ("wild", "m"), ("low", "m")),
        Contrast("by seed", ("high", "m"), ("high", "n")),
        Contrast("number", ("low", "m"), 0.5),
        Contrast("missing", ("gone", "m"), 0.5),
    ]
    found = claims.contrasted(contrasts, values, 3)
    assert [f.verdict for f in found] == ["reproduced", "contradicted", "inconclusive", "reproduced", "contradicted"]
    assert found[0].found.value == pytest.approx(0.8) and found[3].found.value == pytest.approx(0.01)
    looks = claims.contrasted(contrasts[:1], by(high=[0.9], low=[0.1]), 1)
    assert looks[0].verdict == claims.LOOK and looks[0].found.value == pytest.approx(0.8)


def test_contrasts_are_corrected_for_their_number():
    """A difference just clear of 0 is a verdict alone and none among twelve; the clearest one stays."""
    rng = np.random.default_rng(0)
    values = by(slight=[0.02, 0.03, 0.06], large=[0.9, 0.91, 0.92]) | by(
        **{f"x{i}": rng.normal(0, 1, 3) for i in range(10)}
    )
    make = lambda name: Contrast(name, (name, "m"), 0.0)  # noqa: E731
    alone = claims.contrasted([make("slight")], values, 3)[0]
    assert alone.verdict == "inconclusive" and alone.found.low < 0
    values["slight"] = [{"m": x} for x in (0.02, 0.03, 0.04)]
    assert claims.contrasted([make("slight")], values, 3)[0].verdict == "reproduced"
    many = {f.claim: f.verdict for f in claims.contrasted([make(name) for name in values], values, 3)}
    assert many["large"] == "reproduced" and many["slight"] == "inconclusive"


def found(value=0.5, missing=None):
    findings = [Finding("a above b", Interval(value, math.nan, math.nan), claims.LOOK)]
    return Found(findings, "| table |", {"Plot": b"\x89PNG"}, {"x": {1: math.nan}}, missing or {})


def card(result):
    return Card(*TEXTS, quick=lambda folder, options: result, full=lambda folder, options: result)


def test_a_page_says_what_was_claimed_tried_and_found(tmp_path):
    run = functools.partial(claim_report.reproduce, name="x", title="A claim.", folder=tmp_path / "c", options=QUIET)
    page = run(card(found()), docs=tmp_path / "docs").markdown
    for part in ("# A claim.", *TEXTS, "| a above b | +0.500 | a look |", "![Plot](x.png)",
                 "| table |", "`engrax reproduce x`", "full run is not done"):  # fmt: skip
        assert part in page
    for where in (tmp_path / "c" / "x_quick", tmp_path / "docs"):
        assert (where / "x.md").read_text() == page and (where / "x.png").read_bytes() == b"\x89PNG"
        data = json.loads((where / "x.json").read_text())
        assert data["data"]["x"]["1"] is None and data["findings"][0]["verdict"] == "a look" and data["hardware"]
    first = data["minutes"]
    page = run(card(found(missing={"run": "no time"})), preset="full").markdown
    assert "full run is not done" not in page and "Missing: run, no time." in page
    run(card(found()))
    assert json.loads((tmp_path / "c" / "x_quick" / "x.json").read_text())["minutes"] > first, "of all calls together"
    with pytest.raises(UserError, match="unknown preset"):
        run(card(found()), preset="fast")


def test_the_list_says_how_far_a_card_has_come(tmp_path, capsys):
    assert claim_report.state(tmp_path, "x", "quick") == "not run"
    (tmp_path / "x_quick" / "run").mkdir(parents=True)
    assert claim_report.state(tmp_path, "x", "quick") == "begun"
    claim_report.reproduce(card(found(missing={"run": "y"})), "x", "t", tmp_path, options=QUIET)
    assert claim_report.state(tmp_path, "x", "quick") == "1 a look, 1 missing"
    assert cli.main(["reproduce", "--folder", str(tmp_path)]) == 0
    assert "forgetting_recall" in (told := capsys.readouterr().out) and "quick: not run; full: not run" in told


def test_a_users_card_runs_by_its_path(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        '"""One is above nothing."""\n'
        "from engrax.evals.claims import Card, Finding, Found\n"
        "from engrax.evals.verdicts import Interval\n"
        "def run(folder, options):\n"
        "    missing = {} if options.minutes is None else {'all': 'no time'}\n"
        "    return Found([Finding('1 > 0', Interval(1.0, 0.5, 1.5), 'reproduced')], '', {}, {}, missing)\n"
        "def card():\n"
        "    return Card('p', 'h', 'r', run, run)\n"
    )
    flags = ["--folder", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")]
    assert cli.main(["reproduce", str(file), *flags]) == 0
    assert "# One is above nothing." in capsys.readouterr().out and (tmp_path / "docs" / "mine.md").exists()
    assert cli.main(["reproduce", str(file), *flags, "--minutes", "0"]) == 1
    with pytest.raises(UserError, match="did you mean"):
        configs.find_card("forgeting_recall")
    page = engrax.reproduce(str(file), folder=tmp_path / "again")
    assert "| 1 > 0 | +1.000 [+0.500, +1.500] | reproduced |" in repr(page)


def heads(directory):
    """A measurement of a run that says how often it was taken."""
    with (directory / "calls").open("a") as calls:
        calls.write("x")
    experiment = runs.open_run(directory).experiment
    return {"heads": float(experiment.model.mixers[0].heads), "seed": float(experiment.seed)}


@pytest.fixture
def untrained(monkeypatch):
    """Trainings write their folders only; two heads are right more often than one."""

    def train(experiment, directory, progress):
        runs.prepare(directory, experiment)
        return type("Result", (), {"finished": True})()

    def measure(directory):
        return Score(np.full(4, runs.open_run(directory).experiment.model.mixers[0].heads / 4), np.ones(4))

    monkeypatch.setattr(trials.loop, "train", train)
    monkeypatch.setattr(trials, "measure", measure)


def test_a_comparison_is_a_preset(tmp_path, untrained):
    """Claims have verdicts, or at one seed looks, and what `by` measures of the judged runs is measured once."""
    claim = Claim("two heads", "one", "s")
    three = Compared(dataclasses.replace(pair(1e-3, 1e-2, 3e-2), claims=(claim,)), heads, "Heads:")
    one, again = (three(epath.Path(tmp_path / "a"), QUIET) for _ in range(2))
    assert one.findings[0].verdict == "reproduced" and one.findings[0].found.value == pytest.approx(0.25)
    assert "| two heads | 2.000 [2.000, 2.000] | 2.000 [1.000, 3.000] |" in one.text and one.text == again.text
    judged = list((tmp_path / "a").glob("*/lr_*_seed_[123]"))
    assert len(judged) == 6 and all((run / "calls").read_text() == "x" for run in judged)
    look = Compared(claims.part(three.comparison, steps=1))
    found = look(epath.Path(tmp_path / "b"), QUIET)
    assert found.findings[0].verdict == claims.LOOK and found.findings[0].found.value == pytest.approx(0.25)
    assert not claims.part(three.comparison, ("one", "two heads"), steps=1).claims[1:]


def test_fewer_bits_are_above():
    """The number of a finding is positive where the claim holds, for bits too; of a look as well."""
    rows = [scored("base", [2.0, 2.01, 1.99]), scored("low", [1.9, 1.91, 1.89])]
    comparison = text("base", "low", claims=[Claim("low", "base", "x")])
    lines, judged = verdicts.judge(comparison, rows)
    for known, said in ((judged, "reproduced"), ([], claims.LOOK)):
        (found,) = claims._claimed(comparison, types.SimpleNamespace(lines=lines, claims=known), "task: ")
        assert found.verdict == said and found.claim == "task: low above base (x)"
        assert found.found.value == pytest.approx(0.1, abs=1e-6) and not found.found.low <= 0


def test_a_part_is_shorter_and_warms_up_in_proportion():
    whole = pair(1e-3, 1e-2, 3e-2)
    warm = AdamWConfig(schedule=CosineConfig(warmup_steps=50))
    long = {name: dataclasses.replace(e, steps=500, optimizer=warm) for name, e in whole.experiments.items()}
    part = claims.part(dataclasses.replace(whole, experiments=long), steps=20, data__num_pairs=1)
    for experiment in part.experiments.values():
        assert (experiment.steps, experiment.optimizer.schedule.warmup_steps, experiment.data.num_pairs) == (20, 2, 1)
    assert part.seeds == 1 and part.claims == whole.claims


def test_measured_runs_are_a_preset(tmp_path, untrained):
    """Experiments that differ in their data are judged by what is measured; what is there is not trained again."""
    contrasts = (Contrast("more", ("two", "heads"), ("one", "heads")), Contrast("late", ("one", "seed"), 0.0))
    data = dataclasses.replace(tiny().data, num_pairs=1)
    measured = Measured({"one": tiny(1), "two": tiny(2, data=data)}, heads, contrasts, RATES)
    one, again = (measured(epath.Path(tmp_path), QUIET) for _ in range(2))
    assert one.findings == again.findings and one.plots["Measured"].startswith(b"\x89PNG")
    assert [f.verdict for f in one.findings] == ["reproduced", "inconclusive"]
    assert one.findings[1].found.value == 2 and "0.001*" in one.text
    assert "judged at the best with seeds 1 to 3" in one.text
    assert measured(epath.Path(tmp_path), dataclasses.replace(QUIET, minutes=0)).findings == one.findings
    with pytest.raises(UserError, match="no table yet"):
        measured(epath.Path(tmp_path / "other"), dataclasses.replace(QUIET, minutes=0))


@pytest.mark.parametrize("name", configs.card_names())
def test_shipped_cards_say_all_that_a_card_says(name):
    card, found, title = configs.find_card(name)
    assert found == name and title.endswith(".") and configs.summary(name) == title
    assert all(len(text) > 40 for text in (card.paper, card.here, card.rule))
    assert "arXiv" in card.paper and callable(card.quick) and callable(card.full)


QUICKEST = ("hopfield_theory", "hmt_gradient")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.deep if n in QUICKEST else pytest.mark.long) for n in configs.card_names()],
)
def test_quick_presets_run(name, tmp_path):
    page = engrax.reproduce(name, folder=tmp_path / "runs", docs=tmp_path / "docs", progress=False)
    assert page.found.findings and not page.found.missing and page.found.plots
    assert (tmp_path / "docs" / f"{name}.md").read_text() == page.markdown
