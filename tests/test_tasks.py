"""Every registered task: oracle, guessers, key spaces, random access, resume, refusals, and the rate of generation."""

import dataclasses
import importlib.util
import itertools
import json
import re

import numpy as np
import pytest

from engrax import data
from engrax.data import DATASETS, MQAR
from engrax.data.task import TaskConfig, earlier
from engrax.data.text_task import TextTask
from engrax.errors import UserError

CLASSES = {  # tests/test_needles.py has the tasks in words
    name: cls for name, cls in DATASETS.items() if issubclass(cls, TaskConfig) and not issubclass(cls, TextTask)
}
TASKS = {  # settings: the task, the tokens that may be answers [low, high), and those that rows may show
    "associative_retrieval": (data.AssociativeRetrieval(), (4, 20), (0, 20)),
    "associative_retrieval, distinct": (
        data.AssociativeRetrieval(keys="distinct", key_size=2, num_pairs=7, vocab_size=9, seq_len=50),
        (4, 9),
        (0, 9),
    ),
    "compositional_mqar": (data.CompositionalMQAR(), (84, 128), (0, 128)),
    "compositional_mqar, zeros": (
        data.CompositionalMQAR(num_pairs=4, vocab_size=13, seq_len=24, random_non_queries=False),
        (8, 13),
        (0, 13),
    ),
    "compression": (data.Compression(), (0, 15), (0, 16)),
    "continual": (data.Continual(), (64, 384), (0, 384)),
    "counters": (data.Counters(), (3, 6), (0, 3)),
    "counters, 3": (data.Counters(kinds=3, seq_len=17, shortest=7), (4, 8), (0, 4)),
    "dyck": (data.Dyck(), (3, 5), (0, 3)),
    "dyck, 3": (data.Dyck(kinds=3, seq_len=41, shortest=10), (7, 11), (0, 7)),
    "forgetting_mqar": (data.ForgettingMQAR(), (64, 128), (0, 128)),
    "forgetting_mqar, full": (
        data.ForgettingMQAR(num_pairs=4, num_updates=4, seq_len=24, vocab_size=15, power_a=1.0),
        (7, 15),
        (0, 15),
    ),
    "fuzzy_in_context_recall": (data.FuzzyInContextRecall(), (7, 15), (0, 16)),
    "fuzzy_in_context_recall, small": (
        data.FuzzyInContextRecall(key_size=2, value_size=1, vocab_size=6, seq_len=31),
        (2, 5),
        (0, 6),
    ),
    "in_context_recall": (data.InContextRecall(), (8, 16), (0, 16)),
    "induction": (data.Induction(), (1, 16), (0, 16)),
    "knights_and_knaves": (data.KnightsAndKnaves(), (1, 3), (0, 12)),
    "knights_and_knaves, 8": (data.KnightsAndKnaves(people=8, seq_len=60, validation="perturbed"), (1, 3), (0, 16)),
    "latch": (data.Latch(), (0, 2), (0, 20)),
    "memorization": (data.Memorization(), (127, 255), (0, 256)),
    "mqar": (data.MQAR(), (64, 128), (0, 128)),
    "noisy_in_context_recall": (data.NoisyInContextRecall(), (8, 16), (0, 32)),
    "noisy_in_context_recall, more": (data.NoisyInContextRecall(noise=0.8, seq_len=64), (8, 16), (0, 32)),
    "palindrome": (data.Palindrome(), (1, 64), (0, 64)),
    "parity": (data.Parity(), (3, 5), (0, 3)),
    "selective_copying": (data.SelectiveCopying(), (0, 14), (0, 16)),
    "selective_copying, mamba": (data.SelectiveCopying(form="mamba", seq_len=32), (0, 14), (0, 16)),
    "set_disjointness": (data.SetDisjointness(), (2, 128), (0, 128)),
    "shuffle": (data.Shuffle(), (5, 9), (0, 5)),
    "shuffle, 3": (data.Shuffle(kinds=3, seq_len=20, shortest=20), (7, 15), (0, 7)),
    "stack": (data.Stack(), (11, 64), (0, 64)),
    "stack, 64": (data.Stack(num_stacks=64, seq_len=256, vocab_size=128), (67, 128), (0, 128)),
}
EVERY = pytest.mark.parametrize("name", TASKS)
EACH = pytest.mark.parametrize("name", CLASSES)


def test_no_task_is_left_out():
    assert {name.split(",")[0] for name in TASKS} == set(CLASSES)
    for name, cls in CLASSES.items():
        assert set(cls.axes) <= {field.name for field in dataclasses.fields(cls)}
        assert cls.__doc__ and getattr(data, cls.__name__) is cls and cls.registered_name == name
    whole = {name for name, cls in CLASSES.items() if cls.whole_rows}
    assert whole == {"parity", "counters", "dyck", "shuffle", "knights_and_knaves"}


@EVERY
@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_oracle_answers_everything_and_guesses_score_chance(name, split):
    task, (low, high), (first, end) = TASKS[name]
    tokens, targets = task.generate(split, np.arange(3000))
    asked = targets != -1
    assert tokens.shape == targets.shape == (3000, task.seq_len) and tokens.dtype == targets.dtype == np.int32
    assert (task.solve(tokens) == targets)[asked].all() and asked.any(axis=1).mean() > 0.99
    assert first <= tokens.min() and tokens.max() < end <= task.vocab_size == max(end, high)
    assert low <= targets[asked].min() and targets[asked].max() < high
    if name == "continual":  # the answers of its tasks are in three ranges
        low, high = 64, 128
        targets = np.where(asked, 64 + targets % 64, -1)
    guess = np.random.default_rng(0).integers(low, high, targets.shape)
    hits, chance = (guess == targets)[asked], 1 / (high - low)
    assert task.chance == pytest.approx(chance)
    assert abs(hits.mean() - chance) < 5 * np.sqrt(chance * (1 - chance) / hits.size)


@EVERY
def test_an_example_is_a_function_of_seed_split_and_index(name):
    task, *_ = TASKS[name]
    tokens, targets = task.generate("train", np.arange(60))
    some = np.array([59, 3, 17, 3])
    for got, want in zip(task.generate("train", some), (tokens, targets)):
        np.testing.assert_array_equal(got, want[some])
    assert [array.shape for array in task.generate("train", np.arange(0))] == [(0, task.seq_len)] * 2
    others = [dataclasses.replace(task, seed=1).generate("train", np.arange(60))]
    if getattr(task, "validation", "new") == "new":
        others.append(task.generate("validation", np.arange(60)))
    for other in others:
        assert np.mean((other[0] == tokens).all(axis=1)) < 0.6  # a^n b^n c^n has few strings


def test_other_processes_make_the_same_rows(run_python):
    code = """
from engrax.data import DATASETS
from engrax.tests.test_tasks import CLASSES
import json
print(json.dumps({name: cls().digest() for name, cls in CLASSES.items()}))
"""
    told = json.loads(run_python(code).strip().splitlines()[-1])
    assert told == {name: cls().digest() for name, cls in CLASSES.items()}
    assert len(set(told.values())) == len(told)


@EACH
def test_a_restored_loader_goes_on_and_two_processes_are_one(name):
    task = dataclasses.replace(CLASSES[name](), train_examples=10)  # batches straddle epochs
    loader = task.loader("train", batch_size=4, seed=1)
    want = list(itertools.islice(loader, 3))
    state = loader.get_state()
    want += list(itertools.islice(loader, 2))
    fresh = task.loader("train", batch_size=4, seed=1)
    parts = [task.loader("train", batch_size=4, seed=1, process_index=i, process_count=2) for i in (0, 1)]
    for batch, other, *halves in zip(want, fresh, *parts):
        np.testing.assert_equal(other, batch)
        np.testing.assert_equal({name: np.concatenate([half[name] for half in halves]) for name in batch}, batch)
    fresh.set_state(state)
    for batch in want[3:]:
        np.testing.assert_equal(next(fresh), batch)


@EACH
def test_slices_are_the_types_of_labelled_positions(name):
    task = CLASSES[name]()
    tokens, targets = task.generate("train", np.arange(50))
    batch = {"tokens": tokens, "targets": targets, "segment_ids": np.zeros_like(tokens)}
    names, index = task.slices(batch)
    assert index.shape == tokens.shape and index.max() < len(names) and len(set(names)) == len(names)
    np.testing.assert_array_equal(index >= 0, targets != -1)


def test_earlier_is_the_nearest_known_place_of_the_same_code():
    codes = np.array([[5, 2, 5, 5, 2, 7], [1, 1, 1, 1, 1, 1]])
    assert earlier(codes).tolist() == [[-1, -1, 0, 2, 1, -1], [-1, 0, 1, 2, 3, 4]]
    known = np.array([[True, False, True, False, True, True], [False, True, False, False, True, False]])
    assert earlier(codes, known).tolist() == [[-1, -1, 0, 2, -1, -1], [-1, -1, 1, 1, 1, 4]]


@pytest.mark.parametrize("name", ["continual", "knights_and_knaves", "stack"])
def test_tfds_holds_any_task(name, tmp_path):
    import tensorflow_datasets as tfds

    from engrax.data.tfds_tasks import build

    task = dataclasses.replace(CLASSES[name](), train_examples=30, validation_examples=5)
    built = build(task, str(tmp_path))
    assert built.startswith(f"engrax_tasks/{name}_l{task.seq_len}_")
    for split, count in (("train", 30), ("validation", 5)):
        source = tfds.data_source(built, split=split, data_dir=tmp_path, download=False)
        records = source.__getitems__(range(len(source)))
        tokens, targets = task.generate(split, np.arange(count))
        np.testing.assert_array_equal([record["tokens"] for record in records], tokens)
        np.testing.assert_array_equal([record["targets"] for record in records], targets)


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("associative_retrieval", dict(seq_len=61), "needs at least 62 tokens"),
        ("associative_retrieval", dict(num_pairs=17, seq_len=80, keys="distinct"), "16 keys of 1; 17 distinct"),
        ("associative_retrieval", dict(num_pairs=0), "at least 1"),
        ("associative_retrieval", dict(vocab_size=4), "at least 5"),
        ("compositional_mqar", dict(num_pairs=8), "square number .*not 8"),
        ("compositional_mqar", dict(seq_len=53), "needs at least 54"),
        ("compositional_mqar", dict(vocab_size=24), "at least 27"),
        ("compositional_mqar", dict(power_a=0.0), "power_a"),
        ("compression", dict(seq_len=63), "even, not 63"),
        ("compression", dict(vocab_size=1), "at least 2"),
        ("continual", dict(seq_len=32), "mqar of continual has seq_len 64, the stream 32"),
        ("continual", dict(tasks=()), "one at least"),
        ("continual", dict(train_examples=2), "number of tasks, 3"),
        ("counters", dict(kinds=1), r"\[2, 26\], not 1"),
        ("counters", dict(kinds=3, seq_len=5, shortest=4), "no string of 4 to 5 symbols; lengths are multiples of 3"),
        ("dyck", dict(kinds=0), "at least 1"),
        ("dyck", dict(shortest=65), "no string of 65 to 64"),
        ("forgetting_mqar", dict(num_updates=9), "num_updates 9"),
        ("forgetting_mqar", dict(seq_len=39), "needs at least 40"),
        ("forgetting_mqar", dict(vocab_size=22), "at least 23"),
        ("forgetting_mqar", dict(power_a=-1.0), "power_a"),
        ("fuzzy_in_context_recall", dict(key_size=0), "at least 1"),
        ("fuzzy_in_context_recall", dict(vocab_size=6), "at least 7"),
        ("fuzzy_in_context_recall", dict(seq_len=11), "needs 12"),
        ("in_context_recall", dict(seq_len=65), "in_context_recall must be even"),
        ("in_context_recall", dict(noise=0.5), "noise_vocab of at least 1"),
        ("noisy_in_context_recall", dict(noise=1.0), r"\[0, 1\)"),
        ("noisy_in_context_recall", dict(vocab_size=17), "no key and value"),
        ("induction", dict(seq_len=2), "at least 3"),
        ("induction", dict(vocab_size=1), "at least 2"),
        ("knights_and_knaves", dict(people=2), r"\[3, 8\], not 2"),
        ("knights_and_knaves", dict(people=5), "at least 35"),
        ("memorization", dict(seq_len=31), "even, not 31"),
        ("memorization", dict(vocab_size=2), "at least 3"),
        ("palindrome", dict(seq_len=31), "even, not 31"),
        ("palindrome", dict(vocab_size=1), "at least 2"),
        ("parity", dict(shortest=0), "no string of 0"),
        ("selective_copying", dict(seq_len=32), "at least 33"),
        ("selective_copying", dict(seq_len=31, form="mamba"), "at least 32"),
        ("selective_copying", dict(vocab_size=2), "at least 3"),
        ("shuffle", dict(kinds=9), r"\[1, 8\], not 9"),
        ("stack", dict(vocab_size=11), "at least 12"),
        ("stack", dict(seq_len=5), "at least 6"),
        ("stack", dict(num_stacks=0), "at least 1"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(name, fields, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        CLASSES[name](**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["associative_retrieval", "compositional_mqar", "forgetting_mqar"])
def test_what_just_fits_is_accepted(name):
    fields = {
        "associative_retrieval": dict(seq_len=62),
        "compositional_mqar": dict(seq_len=54, vocab_size=27),
        "forgetting_mqar": dict(seq_len=40, vocab_size=23),
    }
    task = CLASSES[name](**fields[name])
    tokens, targets = task.generate("train", np.arange(20))
    assert (task.solve(tokens) == targets)[targets >= 0].all()


def test_a_stream_of_tasks_is_saved_and_loaded():
    from engrax.tests.experiments import tiny
    from engrax.train.experiment import from_json, to_json

    stream = data.Continual(tasks=(MQAR(), data.Stack(seq_len=64)))
    experiment = tiny()
    experiment = dataclasses.replace(
        experiment, data=stream, model=dataclasses.replace(experiment.model, vocab_size=stream.vocab_size)
    )
    assert from_json(to_json(experiment)).data == stream


@pytest.fixture(scope="module")
def benchmark(root):
    spec = importlib.util.spec_from_file_location("benchmarks_tasks", root / "benchmarks" / "tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generation_is_quick(benchmark):
    """A fifth of what benchmarks/tasks.py asks for, because other programs share the processor's caches."""
    timed = benchmark.tasks()
    assert set(timed) == set(CLASSES)
    for name, task in timed.items():
        assert task.seq_len == 128
        rate = benchmark.rows_per_second(task, rounds=1, block=1024)
        assert rate > benchmark.TARGET / 5, f"{name}: {rate:,.0f} rows/s"


def test_the_page_describes_every_task(root):
    page = (root / "docs" / "tasks.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(CLASSES)
    for name, text in sections.items():
        (odds,) = re.findall(r"Chance:\s1/(\d+)", text)
        assert CLASSES[name]().chance == pytest.approx(1 / int(odds))
        fields = {field.name for field in dataclasses.fields(CLASSES[name])}
        named = set(re.findall(r"`(\w+)(?:=[^`]+)?`", text))
        assert {word for word in named if "_" in word} <= fields | {"vocab_size"}
