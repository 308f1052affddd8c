"""Mixtures of tasks: shares, curricula, random access, resume to the bit, accuracies by task, and users' mistakes."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from engrax.data import MQAR, Curriculum, Palindrome, Parity, StdlibText, TaskMixture
from engrax.errors import UserError
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig
from engrax.tests.experiments import tiny
from engrax.train import AdamWConfig, ConstantConfig
from engrax.train import experiment as experiments
from engrax.train.trainer import Trainer

SMALL = dict(train_examples=512, validation_examples=40)
SHORT, LONG = (MQAR(seq_len=t, num_pairs=n, vocab_size=32, **SMALL) for t, n in ((16, 2), (24, 4)))
HARDER = (
    Curriculum(1, "num_pairs", values=(1, 3), until=(10, 20), shape="stages"),
    Curriculum(1, "seq_len", values=(16,), until=(20,), multiple=4),
    Curriculum(0, "weight", values=(3, 0), until=(10, 30), shape="linear"),
)


def mixture(**fields):
    return TaskMixture(**{"tasks": (SHORT, LONG), "weights": (1, 3), "seq_len": 24, **fields})


def take(loader, first, count):
    return list(itertools.islice(loader, first, first + count))


def of(mixed, batch):
    """The task of each row of SHORT, LONG or a longer stage of it, from its length."""
    return np.where((batch["segment_ids"] == 0).sum(axis=1) == 16, 0, 1)


def test_the_shares_are_the_weights():
    """When 10,000 rows are read, then each task has its share to 4 rows, and of any 100 rows in a row to 3."""
    tasks = tuple(dataclasses.replace(SHORT, seq_len=t) for t in (16, 18, 20))
    mixed = TaskMixture(tasks=tasks, weights=(6, 3, 1), seq_len=20)
    wanted = np.array([0.6, 0.3, 0.1])
    lengths = [(b["segment_ids"] == 0).sum(axis=1) for b in take(mixed.loader("train", batch_size=100, seed=3), 0, 100)]
    found = np.array([[(batch == t).sum() for t in (16, 18, 20)] for batch in lengths])
    assert np.abs(found.sum(axis=0) - 10_000 * wanted).max() <= 4
    assert np.abs(found - 100 * wanted).max() <= 3


def test_rows_are_examples_of_the_tasks_and_padding():
    mixed = mixture()
    examples = [task.generate("train", np.arange(512)) for task in mixed.tasks]
    for batch in take(mixed.loader("train", batch_size=50), 0, 4):
        for row, task in enumerate(of(mixed, batch)):
            end = mixed.tasks[task].seq_len
            known = (examples[task][0] == batch["tokens"][row, :end]).all(axis=1)
            (match,) = np.flatnonzero(known)[:1]
            np.testing.assert_array_equal(batch["targets"][row, :end], examples[task][1][match])
            assert (batch["targets"][row, end:] == -1).all() and (batch["tokens"][row, end:] == 0).all()
            np.testing.assert_array_equal(batch["segment_ids"][row], np.where(np.arange(24) < end, 0, -1))


def test_a_curriculum_is_a_function_of_the_step():
    """The expectations are computed by hand from the definition."""
    mixed = mixture(curriculum=HARDER)
    assert [mixed.task_at(1, step).num_pairs for step in (0, 9, 10, 19, 20, 1 << 50)] == [1, 1, 3, 3, 4, 4]
    assert [mixed.task_at(1, step).seq_len for step in (0, 4, 5, 10, 16, 20, 99)] == [16, 16, 16, 20, 24, 24, 24]
    weights = [mixed.shares(step)[0] / mixed.shares(step)[1] for step in (0, 5, 10, 20, 30, 31)]
    np.testing.assert_allclose(weights, np.array([3, 1.5, 0, 0.5, 1, 1]) / 3)
    assert mixed.task_at(0, 5) == SHORT
    asked = [(batch["targets"] >= 0).sum(axis=1).max() for batch in take(mixed.loader("train", batch_size=8), 0, 25)]
    assert asked[9:11] == [2, 3] and asked[24] == 4  # SHORT has 2
    loader = mixed.loader("train", batch_size=40)
    counts = [(batch["targets"][:, 16:] >= 0).any() for batch in take(loader, 0, 3)]
    assert counts == [False, False, False]  # rows of 16 tokens


@pytest.mark.parametrize("step", [0, 11, 1_000_000])
def test_any_step_is_the_same_alone_and_in_parts(step):
    """When a loader is set to a step, then it yields the rows of a loader that read all before, in any processes."""
    mixed = mixture(curriculum=HARDER, weights=(2, 3))
    position = {"next_index": step}
    loader = mixed.loader("train", batch_size=12, seed=5)
    if step < 100:
        take(loader, 0, step)
        assert json.loads(json.dumps(loader.get_state())) == position
    else:
        loader.set_state(position)
    wanted = take(loader, 0, 3)
    for count in (1, 3):
        same = [
            mixed.loader("train", batch_size=12, seed=5, process_index=i, process_count=count) for i in range(count)
        ]
        for part in same:
            part.set_state(position)
        for batch in wanted:
            parts = [next(part) for part in same]
            for name, array in batch.items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)
    other = mixed.loader("train", batch_size=12, seed=6)
    other.set_state(position)
    assert (next(other)["tokens"] != wanted[0]["tokens"]).any()


@pytest.mark.parametrize("split", ["train", "validation"])
def test_one_pass_has_every_example_once(split):
    mixed = mixture(tasks=(SHORT, dataclasses.replace(LONG, validation_examples=20)), curriculum=HARDER)
    batches = list(mixed.loader(split, batch_size=25, epochs=1))
    rows = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    used = (rows["segment_ids"] == 0).any(axis=1)
    total = 1024 if split == "train" else 60
    assert used.sum() == total and used[:total].all()
    which = of(mixed, {name: array[:total] for name, array in rows.items()})
    for i, task in enumerate(mixed.tasks):
        got = rows["tokens"][:total][which == i][:, : task.seq_len]
        np.testing.assert_array_equal(got, task.generate(split, np.arange(task.num_examples(split)))[0])
    if split == "validation":
        names, sources = mixed.sources(np.arange(75))
        assert names == ("mqar_0", "mqar_1") and sources.tolist() == [*which, *[-1] * 15]
        assert np.bincount(which[:30]).tolist() == [20, 10]  # spread evenly
        assert (mixed.solve(rows["tokens"], sources) == rows["targets"])[rows["targets"] >= 0].all()
        assert mixed.chance == pytest.approx(1 / 16)


def test_separate_tokens():
    parity, palindrome = Parity(seq_len=20, **SMALL), Palindrome(seq_len=24, **SMALL)
    mixed = TaskMixture(tasks=(parity, palindrome), weights=(1, 1), seq_len=24, tokens="separate")
    assert mixed.vocab_size == 5 + 64 and mixed.names == ("parity", "palindrome")
    batch = next(mixed.loader("validation", batch_size=80, epochs=1))
    _, source = mixed.sources(np.arange(80))
    real = batch["segment_ids"] >= 0
    np.testing.assert_array_equal((batch["tokens"] >= 5)[real], np.repeat(source == 1, real.sum(axis=1)))
    answered = batch["targets"] >= 0
    assert (mixed.solve(batch["tokens"], source) == batch["targets"])[answered].all()
    asked = [answered[source == i].sum() for i in (0, 1)]
    assert mixed.chance == pytest.approx((asked[0] / 2 + asked[1] / 63) / sum(asked))


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(tasks=()), "task_mixture needs tasks"),
        (dict(weights=(1,)), "2 tasks and 1 weights"),
        (dict(weights=(1, 0)), "must be positive and finite, not 0"),
        (dict(weights=(1, -2.0)), "must be positive and finite, not -2.0"),
        (dict(weights=(float("nan"), 1)), "must be positive and finite, not nan"),
        (dict(tasks=(SHORT, MQAR(seq_len=24, num_pairs=4))), "tasks 0 and 1 .* 32 and 128 tokens; .*'separate'"),
        (dict(tasks=(SHORT, StdlibText())), "task 1 of task_mixture is no generated task"),
        (dict(seq_len=23), r"task 1 \(mqar\).* rows of 24 tokens, and the mixture of 23; .* at least 24"),
        (dict(curriculum=[(2, "num_pairs", (1,), (5,))]), "is of task 2, and the mixture has the tasks 0 to 1"),
        (dict(curriculum=[(0, "num_pair", (1,), (5,))]), "no number of task 0 .*did you mean 'num_pairs'"),
        (dict(curriculum=[(0, "random_non_queries", (1,), (5,))]), "no number of task 0"),
        (dict(curriculum=[(0, "weight", (1,), (5,)), (0, "weight", (2,), (5,))]), "two curricula change weight"),
        (dict(curriculum=[(0, "weight", (), ())]), "has 0 values and 0 steps in until; give at least one"),
        (dict(curriculum=[(0, "weight", (1, 2), (5,))]), "has 2 values and 1 steps"),
        (dict(curriculum=[(0, "weight", (1, 2), (5, 5))]), "steps that are positive and ascend"),
        (dict(curriculum=[(0, "weight", (1,), (0,))]), "steps that are positive and ascend"),
        (dict(curriculum=[(0, "weight", (-1,), (5,))]), "not negative"),
        (dict(curriculum=[(0, "weight", (0,), (5,)), (1, "weight", (0,), (5,))]), "are 0 at step 0"),
        (dict(curriculum=[(1, "seq_len", (40,), (5,))]), "at step 0, has rows of 40 tokens"),
        (dict(curriculum=[(1, "vocab_size", (40,), (5,))]), "40 tokens, more than its own 32"),
        (dict(curriculum=[(1, "num_pairs", (9,), (5,))]), "num_pairs|seq_len"),
        (dict(curriculum=[(1, "num_pairs", (1,), (5,), "linear", 0)]), "multiple=0"),
    ],
)
def test_mistakes_are_one_sentence(fields, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        if "curriculum" in fields:
            fields = {"curriculum": tuple(Curriculum(*each) for each in fields["curriculum"])}
        mixture(**fields)
    assert "\n" not in str(caught.value)


MODEL = LanguageModelConfig(
    vocab_size=32, dim=16, mixers=(LinearAttentionConfig(heads=1, head_dim=4),), repeat=1, mlp_hidden=16
)


def experiment(**fields):
    optimizer = AdamWConfig(learning_rate=1e-2, schedule=ConstantConfig(warmup_steps=2))
    given = {"model": MODEL, "data": mixture(curriculum=HARDER), "steps": 14, "optimizer": optimizer}
    return tiny(**given | {"allow_future": True} | fields)  # allow_future skips the probe, which takes seconds


def test_a_mixture_is_saved_and_told(capsys, tmp_path):
    from engrax import cli

    data = mixture(curriculum=HARDER)
    assert experiments.from_json(experiments.to_json(tiny(data=data))).data == data
    assert data.digest() != mixture().digest() != mixture(weights=(3, 1)).digest()
    (tmp_path / "mixed.py").write_text("from engrax.tests.test_task_mixture import experiment as config\n")
    assert cli.main(["describe", str(tmp_path / "mixed.py"), "--data.weights", "1", "1"]) == 0
    told = capsys.readouterr().out
    assert "mqar_0            75.0%, later 50.0% of the rows; seq_len 16, " in told
    assert "num_pairs 1 at step 0, 3 at step 10, its own from step 20" in told
    assert cli.main(["describe", str(tmp_path / "mixed.py"), "--model.vocab-size", "31"]) == 0
    assert cli.main(["train", str(tmp_path / "mixed.py"), "--model.vocab-size", "31"]) == 2
    assert "model.vocab_size=31 is smaller than the data's 32 tokens" in capsys.readouterr().err


@pytest.mark.deep
def test_resume_to_the_bit_and_the_report(tmp_path):
    """When a run is stopped inside the curriculum, then it continues as if it had not; the report has every task."""
    from engrax import evals
    from engrax.train import loop, metrics

    loop.train(experiment(), tmp_path / "whole", progress=False)
    for steps in (7, 14):
        loop.train(experiment(steps=steps), tmp_path / "stopped", progress=False)
    found, again = (metrics.read(tmp_path / name) for name in ("whole", "stopped"))
    assert [row["loss"] for row in found] == [row["loss"] for row in again] and len(found) == 14
    results = evals.evaluate(tmp_path / "whole", only=["validation", "sources"], progress=False)
    told = results.evaluations["sources"]["accuracies"]
    assert [(told[name]["oracle"], told[name]["chance"], told[name]["rows"]) for name in told] == [(1, 1 / 16, 40)] * 2
    assert results.evaluations["validation"]["task"]["oracle"] == 1
    right = [told[name]["accuracy"]["value"] for name in ("mqar_0", "mqar_1")]
    assert (right[0] * 2 + right[1] * 4) / 6 == pytest.approx(results.accuracy)  # 2 questions a row, and 4
    assert "Accuracy of each task" in results.report.read_text() and "mqar_1" in results.summary()


def test_the_example_of_the_page_trains_and_every_task_has_its_accuracy(root, tmp_path):
    from engrax.commands.common import find_config

    page = (root / "docs" / "tasks.md").read_text(encoding="utf-8")
    (example,) = [block.split("```")[0] for block in page.split("```python\n") if "TaskMixture(" in block]
    (tmp_path / "mixed.py").write_text(example)
    found = find_config(str(tmp_path / "mixed.py")).experiment
    tasks = tuple(dataclasses.replace(task, validation_examples=8) for task in found.data.tasks)
    fields = {f"data.tasks.{i}.validation_examples": 8 for i in range(3)} | {"model.dim": 8, "model.repeat": 1}
    trainer = Trainer(experiments.replace(found, fields | {"batch_size": 4, "compute_dtype": "float32"}))
    assert trainer.experiment.data == dataclasses.replace(found.data, tasks=tasks)
    state, loader = trainer.init_state(), trainer.loader("train")
    for _ in range(3):
        state, values = trainer.train_step(state, trainer.put(next(loader)))
    assert np.isfinite(values["loss"])
    told = trainer.validate(state["params"], 9)
    by_task = [told[f"validation_accuracy/{name}"] for name in ("mqar_0", "mqar_1", "selective_copying")]
    questions = np.array([8, 16, 16])  # of a row
    assert by_task @ questions / sum(questions) == pytest.approx(told["validation_accuracy"])
