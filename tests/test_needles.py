"""Tasks in words: oracle, sizes, statistics by definition, scoring rules, and what is asked of a model."""

import dataclasses
import functools
import json
import pathlib
import re
import tempfile

import numpy as np
import pytest

from engrax import data
from engrax.data import DATASETS, scoring_rules
from engrax.data.haystack import NOISE, load_text, made_words
from engrax.data.niah import Needles
from engrax.data.text_task import TextTask
from engrax.errors import UserError

CLASSES = {name: cls for name, cls in DATASETS.items() if issubclass(cls, TextTask)}
NEEDLES = [name for name, cls in CLASSES.items() if issubclass(cls, Needles)]
LENGTH = 2400  # tokens of a row
EACH = pytest.mark.parametrize("name", CLASSES)
DRAWN = pytest.mark.parametrize("name", [name for name in CLASSES if name != "recall_window"])  # it has only its file


BABI = """1 Mary went to the kitchen.
2 John moved to the garden.
3 Where is Mary? \tkitchen\t1
4 Mary journeyed to the office.
5 Where is Mary? \toffice\t4
6 Where is John? \tgarden\t2
1 John travelled to the office.
2 Where is John? \toffice\t1
"""


@functools.cache
def files():
    """A folder with stories of bAbI and a file of questions."""
    folder = pathlib.Path(tempfile.mkdtemp())
    for split in ("train", "test"):
        (folder / f"qa1_single-supporting-fact_{split}.txt").write_text(BABI)
    (folder / "qa8_lists-sets_train.txt").write_text("1 Mary took milk.\n2 What? \tmilk,apple\t1\n")
    (folder / "qa8_lists-sets_test.txt").write_text("1 Mary took milk.\n2 What? \tmilk\t1\n")
    (folder / "qa2_broken_train.txt").write_text("Mary went.\n")
    (folder / "qa2_broken_test.txt").write_text("Mary went.\n")
    text = " ".join(load_text(None).words[:900])
    records = [
        {
            "text": f"{text[40 * i : 40 * i + 4000]} The size of {i} is Number-{i} here. {text[:4000]}.",
            "value": f"number-{i}",
        }
        for i in range(30)
    ] + [{"text": "nothing here", "value": "something"}]
    lines = [json.dumps(record | {"question": f"The size of {i} is"}) for i, record in enumerate(records)]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    return folder


def build(name, **fields):
    local = {
        "babilong": lambda: {"babi_path": str(files())},
        "recall_window": lambda: {"questions_path": str(files() / "questions.jsonl")},
    }.get(name, dict)()
    return CLASSES[name](**dict(seq_len=LENGTH) | local | fields)


def examples(task, count, split="validation"):
    return [task.example(split, i) for i in range(count)]


def assert_share(hits, expected):
    """The share of true values is the expected one, within 5 standard errors."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / hits.size) + 1e-12


@pytest.fixture(scope="module")
def words_tokenizer(tmp_path_factory):
    """A byte-level BPE tokenizer of 600 tokens."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator([NOISE, " ".join(load_text(None).words[:5000])], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    found.save(str(path))
    return str(path)


@EACH
@pytest.mark.parametrize("tokens", ["bytes", pytest.param("words", marks=pytest.mark.deep)])
def test_the_oracle_answers_everything(name, tokens, words_tokenizer):
    """In tokens and in words; every answer has the tokens behind its question as labels, and a row is not exceeded."""
    task = build(name, tokenizer_file=None if tokens == "bytes" else words_tokenizer)
    rows, targets = task.generate("train", np.arange(6))
    labelled = targets != -1
    assert rows.shape == targets.shape == (6, LENGTH) and rows.dtype == targets.dtype == np.int32
    assert (task.solve(rows) == targets)[labelled].all() and labelled.any(axis=1).all()
    assert rows.max() < task.vocab_size and task.chance == 1 / task.vocab_size
    np.testing.assert_array_equal(rows[:, 1:][labelled[:, :-1]], targets[labelled])
    for i, example in enumerate(examples(task, 6, "train")):
        turn = example.turns[-1]
        written = targets[i][labelled[i]]
        assert task.tokenizer.decode(written).endswith(turn.answer)
        hits, trials = task.score(turn.answer, example, turn)
        assert hits == trials >= 1 and task.score("", example, turn) == (0, trials)


@DRAWN
def test_the_haystack_is_as_large_as_fits(name, words_tokenizer):
    for tokenizer in (None, words_tokenizer):
        task = build(name, tokenizer_file=tokenizer)
        for i in range(4):
            assert -0.25 * LENGTH < task._sized("validation", i, task._units)[2] <= (0 if i == 0 else 200)
        assert task._sized("validation", 0, task._units + 1)[2] > 0


@DRAWN
def test_an_example_is_a_function_of_seed_split_and_index(name):
    task = build(name)
    tokens, targets = task.generate("train", np.arange(8))
    some = np.array([7, 3, 3])
    for got, want in zip(task.generate("train", some), (tokens, targets)):
        np.testing.assert_array_equal(got, want[some])
    for other in (dataclasses.replace(task, seed=1).generate("train", np.arange(8)), task.generate("validation", some)):
        assert not (other[0][:3] == tokens[:3]).all(axis=1).any()
    assert build(name, seed=1).digest() != task.digest() == build(name).digest()


def test_other_processes_make_the_same_rows(run_python):
    code = "from engrax.tests.test_needles import digests; import json; print(json.dumps(digests()))"
    told = json.loads(run_python(code).strip().splitlines()[-1])
    assert told == digests() and len(set(told.values())) == len(told)


def digests():
    return {name: build(name).digest() for name in CLASSES}


# Scoring.


@pytest.mark.parametrize(
    "output, references, every, any_",
    [
        (" 1234567.", ("1234567",), (1, 1), (1, 1)),
        (" 12345678", ("1234567",), (1, 1), (1, 1)),  # containment: RULER counts it
        (" 123456", ("1234567",), (0, 1), (0, 1)),
        (" 7654321, and 1234567", ("1234567", "7654321"), (2, 2), (1, 1)),
        (" 7654321", ("1234567", "7654321"), (1, 2), (1, 1)),
        (" ABCDE", ("abcde", "x"), (1, 2), (1, 1)),
        (" abcde", ("ABCDE", "x"), (1, 2), (1, 1)),
        ("", ("a", "b", "c"), (0, 3), (0, 1)),
    ],
)
def test_string_matches(output, references, every, any_):
    assert scoring_rules.match_all(output, references) == every
    assert scoring_rules.match_part(output, references) == any_


@pytest.mark.parametrize(
    "output, right",
    [
        (" 123.", 1),
        (" is 123", 1),
        (" 0123", 1),
        ("1234", 0),
        (" 12 3", 0),
        ("no idea", 0),
        (" 7, then 123", 0),
        ("", 0),
    ],
)
def test_the_first_integer_counts(output, right):
    assert scoring_rules.first_integer(output, ("123",)) == (right, 1)


# Mistakes.


@pytest.mark.parametrize(
    "name, fields, sentence",
    [
        ("niah_single_1", dict(seq_len=300), r"too short for niah_single_1: .* need \d+ tokens more; choose at least"),
        ("niah_single_2", dict(haystack_path="nowhere"), "text folder nowhere does not exist"),
        ("niah_single_2", dict(words_path="nowhere.txt"), "word list nowhere.txt does not exist"),
        ("niah_single_1", dict(tokenizer_file="nowhere.json"), "tokenizer file nowhere.json does not exist"),
        ("niah_single_1", dict(depth=101), "between 0 and 100 per cent, not 101"),
        ("niah_multikey_1", dict(num_keys=41), "40 places for needles, and there are 41"),
        ("niah_multivalue", dict(num_values=0), "num_values must be at least 1"),
        ("passkey", dict(depth=-1), "between 0 and 100 per cent, not -1"),
        ("variable_tracking", dict(num_hops=0), "num_hops must be at least 1"),
        ("variable_tracking", dict(seq_len=1024), "too short for variable_tracking"),
        ("common_words", dict(num_common=0), "num_common must be at least 1"),
        ("common_words", dict(words_path="nowhere.txt"), "word list nowhere.txt does not exist"),
        ("frequent_words", dict(alpha=1.0), "alpha must lie above 1"),
        ("frequent_words", dict(seq_len=600), "too short for frequent_words"),
        ("babilong", dict(babi_path="nowhere"), "babi_path='nowhere' is no folder"),
        ("babilong", dict(question_type="qa3"), r"holds 0 files qa3_\*_train.txt"),
        ("babilong", dict(question_type="qa8"), "are lists"),
        ("babilong", dict(question_type="qa2"), "is no file of bAbI: 'Mary went.'"),
        ("babilong", dict(seq_len=30), "no story of qa1 fits"),
        ("babilong", dict(facts_from=50, facts_to=50), "must be ascending"),
        ("recall_window", dict(questions_path="nowhere"), "question file 'nowhere' does not exist"),
        ("recall_window", dict(answer_field="answer"), "line 1 has no field"),
        ("segment_order", dict(distance=4), "None or 0 to 3, not 4"),
        ("segment_order", dict(seq_len=500_000), "fewer than a row of 500000 tokens takes"),
        ("key_values", dict(num_questions=0), "num_questions must be at least 1"),
        ("niah_single_1", dict(answer_tokens=0), "answer_tokens must be at least 1"),
    ],
)
def test_mistakes_are_one_sentence(name, fields, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build(name, **fields).check()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_digits_is_refused(tmp_path):
    import tokenizers

    letters = {letter: i for i, letter in enumerate(["?", *"abcdefghijklmnopqrstuvwxyz .\n"])}
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token="?"))
    found.save(str(tmp_path / "letters.json"))
    with pytest.raises(UserError, match="does not know all of 0123456789"):
        build("niah_single_1", tokenizer_file=str(tmp_path / "letters.json")).check()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no text"):
        build("niah_single_2", haystack_path=str(tmp_path / "empty")).check()


def test_texts_that_do_not_do_are_refused(tmp_path):
    (tmp_path / "again.txt").write_text("again and " * 3000)
    with pytest.raises(UserError, match="the text repeats itself"):
        build("segment_order", haystack_path=str(tmp_path / "again.txt")).check()
    (tmp_path / "words.txt").write_text(" ".join(made_words(64)))
    with pytest.raises(UserError, match="64 words are too few for"):
        build("niah_multikey_2", words_path=str(tmp_path / "words.txt"), seq_len=400_000).check()


def test_what_seems_to_fit_is_drawn_again_until_it_does():
    """At the least length of the first example, others with longer words do not fit as they are drawn first."""
    with pytest.raises(UserError) as caught:
        build("niah_single_1", seq_len=300).check()
    least = int(re.search(r"at least (\d+)", str(caught.value))[1])
    task = build("niah_single_1", seq_len=least)
    assert any(task._sized("train", i, 1)[2] > 0 for i in range(50))
    assert all(len(task._fitted("train", i)[1]) == 2 for i in range(50))
    with pytest.raises(UserError):
        build("niah_single_1", seq_len=least - 1).check()


def test_the_page_describes_every_task(root):
    page = (root / "docs" / "needles.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(CLASSES)
    for name, cls in CLASSES.items():
        assert cls.__doc__ and getattr(data, cls.__name__) is cls and cls.registered_name == name
        assert set(cls.axes) <= {field.name for field in dataclasses.fields(cls)}
