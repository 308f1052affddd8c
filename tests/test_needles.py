"""Tasks in words: oracle, sizes, statistics by definition, scoring rules, and what is asked of a model."""

import collections
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
from engrax.data.babilong import read_stories
from engrax.data.draws import Draws
from engrax.data.haystack import NOISE, load_text, made_words, sentences
from engrax.data.niah import DEPTHS, Needles
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


# The needles.


def facts(text):
    return re.findall(r"One of the special magic (\w+) for (\S+) is: (\S+)\.(?=\s|$)", text)


@pytest.mark.parametrize("name", NEEDLES)
def test_needles_have_their_numbers_and_kinds(name):
    task = build(name, seq_len=3000)
    patterns = {
        "numbers": r"[1-9]\d{6}",
        "words": r"[a-z]+-[a-z]+",
        "uuids": r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    }
    singular = {"numbers": "number", "uuids": "uuid"}[task.value_kind]
    for example in examples(task, 40):
        found = facts(example.context)
        (turn,) = example.turns
        kinds, keys, values = zip(*found)
        needles = task._keys * task.num_values
        assert len(found) == needles + (task._units if task.haystack == "needle" else 0) - task_shrunk(task, example)
        assert set(kinds) == {task.value_kind} and len(set(keys)) == len(found) / task.num_values
        assert all(re.fullmatch(patterns[task.key_kind], key) for key in keys)
        assert all(re.fullmatch(patterns[task.value_kind], value) for value in values)
        count = task.num_queries * task.num_values
        asked = re.search(r"for (.+?) mentioned", turn.question)[1].replace("and ", "").split(", ")
        assert len(turn.references) == count and len(asked) == task.num_queries
        assert {v for _, key, v in found if key in asked} == set(turn.references)
        if count == 1:
            assert f"\nWhat is the special magic {singular} for {asked[0]} mentioned" in turn.question
            assert example.context.startswith(f"A special magic {singular} is hidden within the following text.")
            assert turn.question.endswith(" mentioned in the provided text is")
        else:
            assert "\nWhat are all the special magic numbers for " in turn.question
            assert example.context.startswith("Some special magic numbers are hidden within the following text.")
            assert turn.question.endswith(" mentioned in the provided text are")
            last = turn.references[-1]
            assert turn.answer == f" {', '.join(turn.references[:-1])}, and {last}."


def task_shrunk(task, example):
    """Needles of a haystack that was made smaller for this example."""
    if task.haystack != "needle":
        return 0
    return task._units + task._needles - len(facts(example.context))


def test_needles_in_text_stand_between_sentences_at_one_of_forty_depths():
    assert len(DEPTHS) == len(set(DEPTHS)) == 40 and DEPTHS[0] == 0 and DEPTHS[-1] == 100 and DEPTHS[1] == 3
    task = build("niah_single_2", seq_len=4096)
    places = []
    for example in examples(task, 400):
        text = example.context.partition("\n")[2]
        before, needle, after = re.split(r"(One of the special magic numbers for \S+ is: \d+\.)", text)
        assert not before or not after or before.endswith((". ", "? ", "! "))  # the text ends inside a sentence
        first, whole = len(sentences(before.strip())), len(sentences(before + after.lstrip()))
        places.append(first / whole)
        assert first in {int(whole * depth / 100) for depth in DEPTHS}
        assert example.depth == pytest.approx(len(before) / len(before + after), abs=0.01)
        assert (before + after.lstrip()).startswith(load_text(None).piece(0, 5))
    assert_share([place == 0 for place in places], 1 / 40)
    assert_share([place == 1 for place in places], 1 / 40)
    assert abs(np.mean(places) - 0.5) < 5 * 0.3 / 20


def test_needles_between_paragraphs_stand_anywhere_but_last():
    task = build("niah_single_1", seq_len=1024)
    found = [example.context.partition("\n")[2].split("\n") for example in examples(task, 600)]
    places = np.array([next(i for i, line in enumerate(lines) if line != NOISE) for lines in found])
    units = np.array([len(lines) - 1 for lines in found])
    most = np.bincount(units).argmax()
    places = places[units == most]
    for place in range(most):
        assert_share(places == place, 1 / most)
    assert all(line == NOISE for lines in found for line in lines if "special" not in line)


def test_without_its_needles_the_text_is_as_it_was():
    for example in examples(build("niah_multivalue"), 20):
        text = example.context.partition("\n")[2]
        around = re.sub(r"One of the special magic \w+ for \S+ is: \d+\.( |$)", "", text).rstrip()
        assert around == load_text(None).piece(0, len(around.split(" ")))


def test_a_given_depth_is_kept():
    for name, depth in (("niah_single_1", 50), ("niah_multikey_1", 100), ("niah_multikey_2", 0)):
        for example in examples(build(name, depth=depth, seq_len=4096), 20):
            assert example.depth == pytest.approx(depth / 100, abs=0.05)


def test_training_text_begins_anywhere_and_a_folder_may_give_it(tmp_path):
    begins = {e.context.partition("\n")[2][:12] for e in examples(build("niah_single_2", depth=50), 20, "train")}
    assert len(begins) > 15
    (tmp_path / "b.txt").write_text("Second file. ")
    (tmp_path / "a.md").write_text("First  file.\n\nIt ends! ")
    assert load_text(str(tmp_path)).piece(0, 8) == "First file. It ends! Second file. First file."
    task = build("niah_single_2", haystack_path=str(tmp_path), depth=0)
    digest = task.digest()
    assert task.example("validation", 0).context.endswith(task._text.piece(0, task._units))
    (tmp_path / "a.md").write_text("Another file. ")
    assert build("niah_single_2", haystack_path=str(tmp_path), depth=0).digest() != digest


def test_made_words_are_distinct_and_a_longer_list_begins_alike():
    assert made_words(50) == made_words(3000)[:50] and len(set(made_words(3000))) == 3000
    assert all(re.fullmatch("[a-z]{4,}", word) for word in made_words(3000))


# The other tasks of the family.


def test_passkeys_are_stated_twice_at_any_letter():
    task = build("passkey", seq_len=900)
    keys, places = [], []
    for example in examples(task, 400):
        task_text, before, line, after, end = (example.context + example.turns[0].question).split("\n")
        key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. (\d+) is the pass key\.", line)
        assert key[1] == key[2] == example.turns[0].references[0] and 1 <= int(key[1]) <= 50_000
        assert end == "What is the pass key? The pass key is" and task_text.startswith("There is an important info")
        assert (f"{NOISE} " * 9).startswith((before, after)) and len(before + after) > 500
        keys.append(int(key[1]))
        places.append(len(before) / len(before + after))
        assert example.depth == pytest.approx(places[-1])
    assert abs(np.mean(keys) - 25_000) < 5 * 14_434 / 20 and abs(np.mean(places) - 0.5) < 5 * 0.29 / 20
    assert build("passkey", depth=25).example("validation", 0).depth == pytest.approx(0.25, abs=0.01)


def test_variables_are_assigned_in_chains():
    task = build("variable_tracking", num_chains=2, num_hops=3, seq_len=3000)
    for example in examples(task, 30):
        worked, text = example.context.split("\n\nMemorize and track")
        lines = text.split("\n")[2:]
        assigned = [line for line in lines if line != NOISE]
        assert len(assigned) == 8 and lines[-1] == NOISE
        starts = [re.fullmatch(r"VAR ([A-Z]{5}) = (\d{5})", line) for line in assigned]
        assert sum(map(bool, starts)) == 2
        (turn,) = example.turns
        value = re.search(r"assigned the value (\d{5}) in the text above", turn.question)[1]
        names, last = list(turn.references), None
        assert len(set(names)) == 4 and "4 variables are assgined" in turn.question
        for name in names:
            line = f"VAR {name} = {value}" if last is None else f"VAR {name} = VAR {last} "
            assert assigned.count(line) == 1
            last = name
        assert turn.answer == " ".join(names) + "\n"
        assert re.search(r"assgined the value \d+, they are: ([A-Z]{3} ){3}[A-Z]{3}$", worked)
        values = {start[2] for start in starts if start}
        assert len(values) == 2 and value in values and 10_000 <= int(value) < 99_999
    tight = build("variable_tracking", worked_example=False)._build(Draws(0), 5, "train", 0).context.split("\n")[2:]
    assert [line == NOISE for line in tight] == [False, True] * 5, "five places in five paragraphs"
    assert "Answer" not in build("variable_tracking", worked_example=False).example("train", 0).context


@pytest.mark.parametrize("length, often, seldom, worked", [(3000, 6, 1, (3, 1, 20)), (8000, 30, 3, (10, 3, 40))])
def test_common_words_occur_more_often(length, often, seldom, worked):
    task = build("common_words", seq_len=length)
    for example in examples(task, 5):
        first, second = (
            part.split("\n")[1] for part in example.context.split("Below is a numbered list of words.")[1:]
        )
        (turn,) = example.turns
        for text, times, common in (
            (second, (often, seldom), turn.references),
            (
                first,
                worked[:2],
                re.findall(r"\d+\. (\w+)", example.context.split("in the list are:")[1].split("\n")[0]),
            ),
        ):
            words = re.findall(r"(\d+)\. (\w+)", text)
            assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
            counts = collections.Counter(word for _, word in words)
            assert collections.Counter(counts.values()) == {times[0]: 10, times[1]: len(counts) - 10}
            assert {word for word, count in counts.items() if count == times[0]} == set(common) and len(common) == 10
        assert len(set(re.findall(r"[a-z]{4,}", first))) == worked[2]
        assert turn.answer == " ".join(f"{i}. {word}" for i, word in enumerate(turn.references, 1)) + "\n"


def test_frequent_words_have_zeta_counts():
    """floor(n / (zeta(2) k^2)): 1000 words give 607 dots, then 151, 67, 37, 24, 16, ..."""
    task = build("frequent_words", seq_len=8000)
    assert task.counts(1000).tolist()[:6] == [607, 151, 67, 37, 24, 16] and len(task.counts(1000)) == 159
    for example in examples(task, 5):
        counts = collections.Counter(example.context.partition("coded words. ")[2].split())
        ordered = counts.most_common(5)
        assert ordered[0][0] == "..." and all(re.fullmatch("[a-z]{6}", word) for word in list(counts) if word != "...")
        assert [word for word, _ in ordered[1:4]] == list(example.turns[0].references)
        assert sorted(counts.values(), reverse=True) == [n for n in task.counts(task._units) if n]
        assert ordered[3][1] > ordered[4][1]
    for units in range(task.least_units, 400):
        counts = task.counts(units)
        assert counts[3] > counts[4]


# Stories, segments, shared contexts, windows.


def test_stories_have_the_facts_before_their_question():
    found = read_stories(BABI, "file")
    assert [story.question for story in found] == [
        "Where is Mary?",
        "Where is Mary?",
        "Where is John?",
        "Where is John?",
    ]
    assert [len(story.facts) for story in found] == [2, 3, 3, 1] and [s.support for s in found] == [0, 2, 1, 0]
    assert [story.answer for story in found] == ["kitchen", "office", "garden", "office"]


def test_facts_stand_in_order_between_sentences():
    task = build("babilong", haystack_path=None)
    assert task.labels == ("garden", "kitchen", "office") and task.guess == 1 / 3
    stories, places = read_stories(BABI, "file"), []
    for example in examples(task, 300):
        (turn,) = example.turns
        question = turn.question.removeprefix("\nQuestion: ").removesuffix("\nAnswer:")
        found = re.findall(r"(?:Mary|John) (?:went|moved|journeyed|travelled) to the \w+\.", example.context)
        (story,) = [s for s in stories if s.facts == tuple(found) and s.question == question]
        assert turn.references == (story.answer,)
        start = example.context.index(story.facts[story.support])
        assert example.depth == pytest.approx(start / len(example.context), abs=0.01)
        if len(story.facts) == 1:
            places.append(example.depth)
    assert abs(np.mean(places) - 0.5) < 5 * 0.3 / np.sqrt(len(places))
    window = build("babilong", facts_from=60, facts_to=70, seq_len=8000)
    inside = [0.58 < example.depth < 0.72 for example in examples(window, 30)]
    assert sum(inside) >= 28  # a sentence may be longer than the window


@pytest.mark.parametrize(
    "output, right",
    [
        (" kitchen.", 1),
        (" The Kitchen", 1),
        (" kitchen or garden", 0),
        (" garden.", 0),
        (" kitchen. Not the garden.", 1),
        ("", 0),
        (" nowhere. kitchen", 0),
        (" office kitchen", 1),  # the question names the office
    ],
)
def test_only_the_target_may_be_named(output, right):
    labels = ("kitchen", "garden", "office")
    assert scoring_rules.only_label(output, "kitchen", "Where was Mary before the office?", labels) == (right, 1)


@pytest.mark.parametrize("part, low, high", [(0, 20, 1 / 4), (1, 1 / 4, 1 / 3), (2, 1 / 3, 1 / 2), (3, 1 / 2, 1)])
def test_segments_lie_in_their_range(part, low, high):
    task = build("segment_order", distance=part)
    letters = []
    for example in examples(task, 100):
        words = example.context.partition("\n")[2].split(" ")
        a, b = (re.search(rf"Segment {x}: (.*)\n", example.turns[0].question)[1].split(" ") for x in "AB")
        at = [next(i for i in range(len(words)) if words[i : i + 20] == segment) for segment in (a, b)]
        letters.append(at[0] < at[1])
        assert example.turns[0].answer == (" A" if at[0] < at[1] else " B")
        assert (low if low >= 1 else low * len(words)) <= abs(at[0] - at[1]) <= high * len(words)
    assert_share(letters, 0.5)


def test_a_context_is_shared_by_its_questions():
    for shared in ("turns", "requests"):
        task = build("key_values", shared=shared, num_questions=4)
        example = task.example("validation", 0)
        pairs = json.loads(example.context.split("\n\n")[1])
        keys = [re.search(r'Key: "(.*)"', turn.question)[1] for turn in example.turns]
        assert len(set(keys)) == 4 and [turn.references for turn in example.turns] == [(pairs[key],) for key in keys]
        assert len(pairs) == task._units and len(example.pieces) == 9


def test_documents_are_cut_around_the_answer():
    task = build("recall_window", seq_len=1000)
    assert task.num_questions("validation") == 30
    for example in examples(task, 10):
        assert "number-" in example.context.lower() and abs(example.depth - 0.5) < 0.03
        assert task.score(" it is NUMBER-3\nor so", example, example.turns[0])[0] == (
            "number-3" in example.turns[0].answer
        )
        assert task.score(" no\n" + example.turns[0].answer, example, example.turns[0]) == (0, 1)
    twice = build("recall_window", seq_len=1000, num_passes=2).example("validation", 3).context
    half = len(twice) // 2 - 1
    assert twice[:half] == twice[half + 2 :] and twice[half : half + 2] == ". "
    whole = build("recall_window", seq_len=20_000).example("validation", 3).context
    assert len(whole) > 8000 and not whole.endswith(".")


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
