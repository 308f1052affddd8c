"""Fair comparisons: what may be compared, the intervals and verdicts, and that an interrupted one continues."""

import dataclasses
import json

import numpy as np
import pytest

from engrax import configs, evals
from engrax.data import MQAR
from engrax.errors import Diverged, UserError
from engrax.evals import Claim, Comparison, trials, verdicts
from engrax.evals.comparison import Row
from engrax.evals.trials import Score
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CheckpointConfig, CosineConfig, EvalConfig, Experiment, LogConfig, runs

COSTS = {"parameters": {"total": 10}, "state_bytes_per_sequence": {"total": 8}, "flops_per_token": {"forward": 5.0}}
RATES = (1e-3, 1e-2, 3e-2)


def tiny(heads: int = 1, **fields) -> Experiment:
    """Two steps of a model of one layer."""
    mixer = LinearAttentionConfig(heads=heads, head_dim=8, conv_width=2, chunk_size=8)
    experiment = Experiment(
        model=LanguageModelConfig(vocab_size=16, dim=8, mixers=(mixer,), repeat=1, mlp_hidden=0),
        data=MQAR(seq_len=16, num_pairs=2, vocab_size=16, train_examples=64, validation_examples=16),
        steps=2,
        batch_size=4,
        optimizer=AdamWConfig(schedule=CosineConfig(warmup_steps=0)),
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=1, batches=1),
        log=LogConfig(every=1),
    )
    return dataclasses.replace(experiment, **fields)


def scored(name: str, means, *, rows: int = 200, noise: float = 0.05, rate: float = 1e-2, learnt=None) -> Row:
    """A row of the table with one score a seed, whose mean over the validation rows is given."""
    shared = np.random.default_rng(1).normal(0, 10 * noise, rows)  # the rows' own difficulty, common to all
    scores = []
    for i, mean in enumerate(means):
        own = np.random.default_rng([*name.encode(), i]).normal(0, noise, rows)
        sums = None if mean is None else 8 * (mean + shared - shared.mean() + own - own.mean())
        scores.append(Score(sums, np.full(rows, 8.0), learnt_at=learnt))
    return Row(name, rate, dict.fromkeys(RATES, 2.0), tuple(scores), COSTS)


def text(*names: str, claims=()) -> Comparison:
    """A comparison in bits, whose experiments are never run."""
    data = dataclasses.make_dataclass("Data", [], frozen=True)
    data.counts_bytes = True
    e = tiny()
    object.__setattr__(e, "data", data())
    return Comparison(dict.fromkeys(names, e), RATES, claims=tuple(claims))


def test_what_cannot_be_compared_fairly_is_refused():
    """When experiments differ in more than the model, or grid and seeds are too few, then the comparison says so."""
    pair = {"a": tiny(1), "b": tiny(2)}
    assert Comparison(pair, RATES).seeds == 3
    for wrong, told in (
        (dict(experiments={"a": tiny()}, learning_rates=RATES), "at least two"),
        (dict(experiments=pair, learning_rates=(1e-3, 1e-3, 1e-2)), "at least three"),
        (dict(experiments=pair, learning_rates=RATES, seeds=2), "at least three"),
        (dict(experiments={"a b": tiny(1), "a_b": tiny(2)}, learning_rates=RATES), "do not differ enough"),
        (dict(experiments=pair | {"b": tiny(steps=3)}, learning_rates=RATES), "differ in steps"),
        (dict(experiments=pair | {"b": tiny(batch_size=8)}, learning_rates=RATES), "differ in batch_size"),
        (dict(experiments=pair, learning_rates=RATES, claims=(Claim("a", "c", ""),)), "'c'"),
    ):
        with pytest.raises(UserError, match=told):
            Comparison(**wrong)


def test_verdicts_follow_the_interval_of_the_difference():
    """When two models differ by more than seeds and rows spread, then one is better; else nothing is said."""
    claims = [Claim("low", "base", "x"), Claim("base", "low", "y"), Claim("near", "base", "z")]
    rows = [
        scored("base", [2.0, 2.01, 1.99]),
        scored("low", [1.9, 1.91, 1.89]),
        scored("high", [2.1, 2.11, 2.09]),
        scored("near", [2.02, 1.97, 2.02]),
        scored("wild", [1.5, 2.4, 1.9]),
    ]
    lines, judged = verdicts.judge(text("base", "low", "high", "near", "wild", claims=claims), rows)
    assert [line.verdict for line in lines] == [None, "better", "worse", "inconclusive", "inconclusive"]
    assert [found.verdict for found in judged] == ["reproduced", "contradicted", "inconclusive"]
    low = lines[1]
    assert low.difference.value == pytest.approx(-0.1, abs=1e-6) and low.difference.high < -0.05
    assert low.score.value == pytest.approx(1.9, abs=1e-6) and low.score.low < 1.9 < low.score.high
    # Rows are common to all: their spread is in the scores, and drops out of the differences.
    assert low.score.high - low.score.low > 2 * (low.difference.high - low.difference.low)


def test_many_verdicts_in_one_table_are_corrected():
    """When a difference is just clear of 0, then it is a verdict alone and none among twelve; a large one stays one.

    Holm: the clearest is judged at 0.05 / 12, the others at 0.05 / 11 and more.
    """
    base, slight = scored("base", [2.0, 2.01, 1.99]), scored("slight", [1.97, 1.98, 1.96])
    large = scored("large", [1.5, 1.51, 1.49])
    equal = [scored(f"equal {i}", [2.0, 2.01, 1.99]) for i in range(10)]
    claims = [Claim(row.name, "base", "x") for row in (slight, large, *equal)]

    def verdicts_on(*rows):
        names = [row.name for row in rows]
        lines, judged = verdicts.judge(text(*names, claims=[c for c in claims if c.better in names]), list(rows))
        assert lines[1].difference.high < 0, "its own interval leaves out 0, in either table"
        return [line.verdict for line in lines[1:]], [found.verdict for found in judged]

    assert verdicts_on(base, slight) == (["better"], ["reproduced"])
    assert verdicts_on(base, slight, large) == (["better"] * 2, ["reproduced"] * 2), "two are still few enough"
    lines, judged = verdicts_on(base, slight, large, *equal)
    assert lines == ["inconclusive", "better", *["inconclusive"] * 10]
    assert judged == ["inconclusive", "reproduced", *["inconclusive"] * 10]


def test_the_interval_of_seeds_alone_is_that_of_their_mean():
    """When rows do not differ, then the interval is near Student's, +-t s / sqrt(n)."""
    means = [1.0, 1.3, 2.1, 2.6, 3.4, 4.6]
    score = verdicts.Bootstrap([scored("a", means, noise=0.0)]).score("a")
    assert score.value == pytest.approx(2.5)
    assert (score.high - score.low) / 2 == pytest.approx(2.571 * np.std(means, ddof=1) / 6**0.5, rel=0.05)


def test_in_a_task_higher_is_better_and_steps_are_counted():
    rows = [scored("base", [0.5] * 3), scored("good", [0.8, 0.9, 1.0], rate=1e-3, learnt=300)]
    rows[0] = dataclasses.replace(rows[0], grid={1e-3: float("nan"), 1e-2: 0.5, 3e-2: 0.4})
    (base, good), _ = verdicts.judge(Comparison({"base": tiny(), "good": tiny()}, RATES), rows)
    assert good.score.high == 1, "no interval of an accuracy ends above 1"
    assert good.verdict == "better" and good.learnt_at == 300 and base.learnt_at is None
    assert (base.at_edge, good.at_edge, base.diverged, good.diverged) == (False, True, 1, 0)


def test_where_a_seed_diverged_nothing_is_said():
    rows = [scored("base", [0.5] * 3), scored("good", [None, 0.9, 0.9])]
    claims = (Claim("good", "base", "x"),)
    (_, good), (judged,) = verdicts.judge(Comparison({"base": tiny(), "good": tiny()}, RATES, claims=claims), rows)
    assert good.difference.low > 0 and good.diverged == 1
    assert good.verdict == judged.verdict == "inconclusive"
    assert verdicts.Bootstrap(rows[::-1]).value("good") == pytest.approx(0.9)


@pytest.mark.deep
def test_equal_models_seldom_differ():
    """When seeds alone spread, then at most 7 of 100 comparisons of 3 seeds call equal models different."""
    found = 0
    for i in range(400):
        means = np.random.default_rng(i).normal(0, 0.02, 6)
        rows = [scored("a", 2 + means[:3], rows=20), scored("b", 2 + means[3:], rows=20)]
        found += verdicts.judge(text("a", "b"), rows)[0][1].verdict != "inconclusive"
    assert found <= 28


@pytest.mark.deep
def test_a_table_of_equal_models_seldom_has_a_verdict():
    """When ten equal models stand in a table, then at most 7 of 100 tables call any of them different."""
    wrong, names = 0, [f"model {i}" for i in range(10)]
    for i in range(100):
        means = np.random.default_rng(i).normal(0, 0.02, (10, 3))
        rows = [scored(name, 2 + mean, rows=20) for name, mean in zip(names, means)]
        wrong += any(line.verdict != "inconclusive" for line in verdicts.judge(text(*names), rows)[0][1:])
    assert wrong <= 7


def pair(*learning_rates: float) -> Comparison:
    """Two experiments of two steps."""
    return Comparison({"one": tiny(1), "two heads": tiny(2)}, learning_rates, claims=(Claim("one", "two heads", "x"),))


def test_the_best_rate_is_run_with_every_seed_and_nothing_twice(tmp_path, monkeypatch):
    """When a comparison is run again, then what was scored is read, not trained, and the tables are the same."""
    trained = []

    def train(experiment, directory, progress):
        rate, heads = experiment.optimizer.learning_rate, experiment.model.mixers[0].heads
        trained.append((heads, rate, experiment.seed))
        runs.prepare(directory, experiment)
        if rate > 1 or (rate == 0.5 and experiment.seed):
            raise Diverged("not finite")
        means[str(directory)] = 0.9 if rate == 1e-2 else 0.5
        return type("Result", (), {"finished": True})()

    means = {}
    monkeypatch.setattr(trials.loop, "train", train)
    monkeypatch.setattr(trials, "measure", lambda d: Score(np.full(4, means[str(d)]), np.ones(4), learnt_at=2))
    found = evals.compare(pair(1e-3, 1e-2, 1e30), tmp_path / "c", command="engrax compare x", progress=False)
    grid = [(1e-3, 0), (1e-2, 0), (1e30, 0), (1e-2, 1), (1e-2, 2), (1e-2, 3)]
    assert trained == [(heads, *trial) for part in (grid[:3], grid[3:]) for heads in (1, 2) for trial in part]
    data = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert data["grids"]["one"]["learning_rates"] == {"0.001": 0.5, "0.01": 0.9, "1e+30": None}
    assert data["grids"]["one"]["seeds"] == [0.9] * 3 and data["claims"][0]["verdict"] == "inconclusive"
    assert "| two heads |" in found.markdown and "2 (3 of 3 seeds)" in found.markdown
    again = evals.compare(pair(1e-3, 1e-2, 1e30), tmp_path / "c", command="engrax compare x", progress=False)
    assert again.markdown == found.markdown and len(trained) == 12
    other = Comparison(pair(1, 2, 3).experiments | {"two heads": tiny(4)}, (1e-3, 1e-2, 1e30))
    with pytest.raises(UserError, match="heads"):
        evals.compare(other, tmp_path / "c", progress=False)
    (tmp_path / "d").mkdir()
    with pytest.raises(UserError, match="every learning rate"):
        evals.compare(pair(1e30, 2e30, 3e30), tmp_path / "d", progress=False)
    with pytest.raises(UserError, match="every judged seed"):
        evals.compare(pair(0.5, 2e30, 3e30), tmp_path / "e", progress=False)


@pytest.mark.deep
def test_a_comparison_trains_and_scores(tmp_path):
    found = evals.compare(pair(1e-3, 1e-2, 1e30), tmp_path, progress=False)
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["unit"] == "accuracy" and [line.name for line in found.lines] == ["one", "two heads"]
    assert all(0 <= line.score.low <= line.score.value <= line.score.high <= 1 for line in found.lines)
    assert all(line.diverged == 1 for line in found.lines)
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_trial_says_so(tmp_path, monkeypatch):
    stopped = type("Stopped", (), {"finished": False, "interrupted": False})()
    monkeypatch.setattr(trials.loop, "train", lambda *args, **kwargs: stopped)
    with pytest.raises(UserError, match="continues from there"):
        evals.compare(Comparison({"a": tiny(1), "b": tiny(2)}, RATES), tmp_path, progress=False)


@pytest.mark.parametrize("name", configs.comparison_names())
def test_shipped_comparisons_are_fair(name):
    """Comparison checks itself when it is built; the summary is its docstring's first line."""
    shipped, found = configs.find_comparison(name)
    assert found == name and configs.summary(name) and len(shipped.experiments) > 1


@pytest.mark.parametrize("higher_is_better", [True, False])
def test_what_is_no_number_is_inconclusive(higher_is_better):
    nan = float("nan")
    assert verdicts.verdict(verdicts.Interval(nan, nan, nan), higher_is_better) == "inconclusive"


@pytest.mark.long
def test_judged_seeds_compile_their_initialisation_alone(run_python, tmp_path):
    out = run_python(
        """
import sys
import jax, jax.monitoring
from engrax.tests.test_compare import RATES, tiny
from engrax.evals import Comparison, comparison, trials
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
misses = []
jax.monitoring.register_event_listener(lambda event, **_: misses.append(event.endswith("/cache_misses")))
score, counts = trials.score, []
def counted(*args):
    before = sum(misses)
    found = score(*args)
    counts.append(sum(misses) - before)
    return found
trials.score = counted
comparison.run(Comparison({"a": tiny(1), "b": tiny(2)}, RATES), sys.argv[1] + "/runs", progress=False)
print(*counts)
""",
        devices=1,
        args=[tmp_path],
        env={"JAX_COMPILATION_CACHE_DIR": None, "ENGRAX_CACHE": str(tmp_path / "cache")},
    )
    counts = [int(count) for count in out.split()]
    grids, judged = counts[:6], counts[6:]
    assert grids[0] > grids[1] == grids[2] >= 1 and max(judged) == 1, counts
