"""What a run writes for tasks in words: an oracle scores all, an untrained model nothing; maps; refusals."""

import dataclasses
import json

import numpy as np
import pytest
from etils import epath
from flax import nnx

from engrax import models
from engrax.data import MQAR, KeyValues, NiahMultivalue, NiahSingle1, NiahSingle2, SegmentOrder, TaskMixture
from engrax.errors import UserError
from engrax.evals import Context, evaluate, needle_map, scoring, task_cells, task_grid, text_answers
from engrax.evals.statistics import Estimate
from engrax.evals.task_grid import Grid
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig
from engrax.models.session import Session
from engrax.tests.experiments import tiny
from engrax.tests.run_folders import text_experiment, write_run
from engrax.train import runs

OWN = NiahSingle1(seq_len=512, answer_tokens=12, train_examples=64, validation_examples=32)
MODEL = LanguageModelConfig(
    vocab_size=256, dim=16, mixers=(LinearAttentionConfig(heads=2, head_dim=8),), repeat=1, mlp_hidden=16
)
EXPERIMENT = tiny(model=MODEL, data=OWN)


class Writer(Session):
    """A stand-in for a session that writes what `answer` says of the texts it was fed."""

    answer = None

    def __init__(self, model, *, tokenizer, rows, dtype, name):
        self.texts = [""] * rows

    def feed(self, texts):
        assert len(texts) == len(self.texts)
        self.texts = [old + new for old, new in zip(self.texts, texts)]
        return self

    def branch(self, rows):
        copy = object.__new__(Writer)
        copy.texts = list(self.texts)
        return copy

    def generate(self, tokens, temperature):
        assert temperature == 0
        return [Writer.answer(text)[:tokens] for text in self.texts]


def judged(task, answer, monkeypatch, examples=20, usable=True):
    monkeypatch.setattr(text_answers, "Session", Writer)
    monkeypatch.setattr(Writer, "answer", staticmethod(answer))
    model, ticks = models.build(MODEL, rngs=nnx.Rngs(0)), []
    context = Context(runs.Run(epath.Path("run"), EXPERIMENT, {}), model, 1)
    scorer = scoring.Scorer(dataclasses.replace(EXPERIMENT, data=task), model)
    hits, trials = text_answers.judged(context, scorer, task, np.full(examples, usable), ticks.append)
    assert sum(ticks) == text_answers.calls(task, examples)
    return hits[:, 0], trials[:, 0]


@pytest.mark.parametrize("task", [OWN, NiahMultivalue(seq_len=1024)])
def test_the_oracle_s_answers_score_all_and_others_nothing(task, monkeypatch):
    hits, trials = judged(task, task.oracle, monkeypatch)
    np.testing.assert_array_equal(hits, trials)
    assert (text_answers.of_oracle(task, 20)[:, 0] == trials).all() and trials[0] == task.num_values
    assert not judged(task, lambda text: " 1000000.", monkeypatch)[0].any()
    hits, trials = judged(task, task.oracle, monkeypatch, usable=False)
    assert not hits.any() and trials.all(), "rows whose outputs are no numbers are wrong, and nothing is asked"


def test_half_an_answer_counts_by_its_parts(monkeypatch):
    task = NiahMultivalue(seq_len=1024)
    hits, trials = judged(task, lambda text: task.oracle(text)[:18], monkeypatch)  # two of the four numbers
    assert set(hits) == {2} and set(trials) == {4}


@pytest.mark.parametrize("shared", ["turns", "requests"])
def test_a_shared_context_is_read_once(shared, monkeypatch):
    """In turns a question stands behind those before it and their right answers; else alone behind the context."""
    task, fed, asked = KeyValues(seq_len=1500, num_questions=3, shared=shared), [], []
    feed = Writer.feed
    monkeypatch.setattr(Writer, "feed", lambda self, texts: fed.append(texts[0]) or feed(self, texts))
    hits, trials = judged(task, lambda text: asked.append(text) or task.oracle(text), monkeypatch, examples=4)
    assert (hits == 3).all() and (trials == 3).all() and (text_answers.of_oracle(task, 4) == 3).all()
    example = task.example("validation", 0)
    (first, second, third), context = example.turns, example.context
    assert sum(text.startswith(context) for text in fed) == 1
    before = (
        context if shared == "requests" else context + first.question + first.answer + second.question + second.answer
    )
    assert asked[0] == context + first.question and before + third.question in asked
    assert not judged(task, lambda text: "no", monkeypatch, examples=4)[0].any()


@pytest.mark.deep
def test_the_more_likely_choice_is_the_answer():
    model = models.build(MODEL, rngs=nnx.Rngs(1))
    task = SegmentOrder(seq_len=700, segment_words=6)
    scorer = scoring.Scorer(dataclasses.replace(EXPERIMENT, data=task), model)
    context = Context(runs.Run(epath.Path("run"), EXPERIMENT, {}), model, 1)
    examples = [task.example("validation", i) for i in range(3)]
    for example, (answer,) in zip(examples, text_answers._answers(context, scorer, task, examples)):
        ids = task.tokenizer.encode(example.pieces[0] + " ").tolist()
        logits = np.asarray(model.logits_of(ids + [0] * (700 - len(ids)))[0, len(ids) - 1])
        assert answer == (" A" if logits[ord("A")] > logits[ord("B")] else " B")
    hits, trials = text_answers.judged(context, scorer, task, np.full(60, True), lambda n: None)
    assert trials.sum() == 60 and 10 < hits.sum() < 50 and task.guess == 0.5


@pytest.mark.deep
def test_what_is_written_is_the_most_likely_continuation():
    """Prompts of unequal lengths in one batch write what each writes alone, token by token over the whole row."""
    model = models.build(MODEL, rngs=nnx.Rngs(1))
    context = Context(runs.Run(epath.Path("run"), EXPERIMENT, {}), model, 1)
    task = dataclasses.replace(OWN, answer_tokens=5)  # the answer has nine, which are kept for it at least
    examples = [task.example("validation", i) for i in range(3)]
    found = text_answers._answers(context, scoring.Scorer(EXPERIMENT, model), task, examples)
    assert len({len(example.pieces[0]) for example in examples}) > 1
    for example, (text,) in zip(examples, found):
        ids = task.tokenizer.encode(example.pieces[0]).tolist()
        for _ in range(9):  # one length for all: it compiles once, and later tokens change nothing before them
            ids.append(int(np.argmax(model.logits_of(ids + [0] * (512 - len(ids)))[0, len(ids) - 1])))
        assert task.tokenizer.decode(ids[-9:]) == text


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "fresh", EXPERIMENT)


@pytest.mark.deep
def test_an_untrained_run_scores_nothing_and_the_folder_has_a_map(run):
    asked = dict(tasks="niah_single_1", lengths=[512], task={"depth": [0, 100]}, examples=20)
    results = evaluate(run, **asked, progress=False)
    found = results.evaluations["tasks"]["tasks"]["niah_single_1"]
    for cell in found["cells"]:
        assert cell["accuracy"]["value"] == cell["slices"]["exact match"]["value"] == cell["chance"] == 0
        assert cell["oracle"] == 1 and cell["examples"] == 20 and 4 < cell["nats"]["value"] < 7
    assert found["map"]["depths"] == ["0 %", "100 %"] and found["map"]["lengths"] == [512]
    assert found["map"]["scores"] == [[0]] * 2 and found["map"]["examples"] == [[20]] * 2
    assert (results.directory / "niah_single_1_map.png").read_bytes().startswith(b"\x89PNG")
    assert "score by depth and length" in results.report.read_text()
    assert json.loads((results.directory / "results.json").read_text()) == results.data
    again = evaluate(run, **asked, progress=False)
    assert again.evaluations["tasks"]["reused_cells"] == 2


def test_a_cell_of_other_texts_is_not_used(tmp_path):
    model = models.build(MODEL, rngs=nnx.Rngs(0))
    cells = task_cells.Cells(Context(runs.Run(epath.Path("run"), EXPERIMENT, {}), model, 1), model, 1, 20)
    (tmp_path / "a.txt").write_text("One text. And a second sentence.")
    task = NiahSingle2(seq_len=1024, haystack_path=str(tmp_path))
    key = cells.key(task)
    assert key == cells.key(dataclasses.replace(task)) != cells.key(dataclasses.replace(task, seed=1))
    (tmp_path / "a.txt").write_text("Another text. And a second sentence.")
    assert key != cells.key(dataclasses.replace(task))


def cell_with(hits):
    """A cell in which only the hits count."""
    one = Estimate(1.0, None, None)
    count = len(hits)
    return task_cells.Cell(
        count, count, tuple(hits.tolist()), (1,) * count, one, one, None, 0.0, None, 1.0, (), 1.0, 1, (), 1, ()
    )


def test_a_map_has_the_means_of_its_places():
    tasks = {(n,): dataclasses.replace(OWN, seq_len=n) for n in (512, 2048)}
    grid = Grid("niah_single_1", {"seq_len": (512, 2048)}, tasks, {})
    hits = {key: np.arange(30) % 2 for key in tasks}
    found = needle_map.of(grid, {key: cell_with(of) for key, of in hits.items()})
    for column, (key, task) in enumerate(tasks.items()):
        place = task.depths(30)
        for row in range(needle_map.BINS):
            inside = (place >= row / 10) & (place < (row + 1) / 10)
            assert found["examples"][row][column] == inside.sum()
            if inside.any():
                assert found["scores"][row][column] == pytest.approx(hits[key][inside].mean())
    assert set(found["mid_sequence_drop"]) == {"512", "2048"}


def test_the_drop_in_the_middle_by_hand():
    """Ends 0.9 and 0.7, middle 0.5: a drop of 0.3; the standard error is that of the three means."""
    depths = np.repeat([0.1, 0.5, 0.9, 1.0], [100, 100, 50, 50])
    scores = np.concatenate([np.arange(100) < 90, np.arange(100) < 50, np.arange(100) < 70]).astype(float)
    found = needle_map.mid_sequence_drop(depths, scores)
    error = np.sqrt((0.09 / 4 + 0.25 + 0.21 / 4) / 99)
    assert found.value == pytest.approx(0.3) and found.high - found.value == pytest.approx(1.968 * error, rel=1e-3)
    assert needle_map.mid_sequence_drop(np.full(9, 0.5), np.ones(9)) is None


@pytest.mark.parametrize(
    "tasks, lengths, fields, told",
    [
        ([], [100], {}, "seq_len 100 is too short for niah_single_1"),
        (["niah_single_2"], [1024], {"haystack_path": ("nowhere",)}, "text folder nowhere does not exist"),
        (["niah_single_1"], [1024], {"depth": (0, 200)}, "between 0 and 100 per cent, not 200"),
        (["mqar"], [64], {}, "reads text through its tokenizer"),
    ],
)
def test_mistakes_are_found_before_anything_is_computed(tasks, lengths, fields, told):
    with pytest.raises(UserError, match=told) as caught:
        task_grid.grids(EXPERIMENT, tasks, lengths, fields)
    assert "\n" not in str(caught.value)


def test_the_task_has_the_run_s_tokenizer(tmp_path):
    e = text_experiment(tmp_path)
    (grid,) = task_grid.grids(e, ["niah_single_2"], [2048])
    assert grid.cells[(2048,)].tokenizer_file == e.data.tokenizer_file
    own = TaskMixture(tasks=(OWN, NiahSingle2(seq_len=512, answer_tokens=12)), weights=(1, 1), seq_len=512)
    mixed = dataclasses.replace(EXPERIMENT, data=own)
    assert own.tokenizer is OWN.tokenizer
    assert [grid.name for grid in task_grid.grids(mixed, lengths=[512])] == ["niah_single_1", "niah_single_2"]
    tokens = tiny(data=MQAR(seq_len=24, num_pairs=2, vocab_size=32))
    with pytest.raises(UserError, match="a task in words, and the run was trained on mqar"):
        task_grid.grids(tokens, ["niah_single_1"], [1024])
