"""The examples of the tasks in words against the definitions of their benchmarks."""

import collections
import json
import re

import numpy as np
import pytest

from engrax.data import scoring_rules
from engrax.data.babilong import read_stories
from engrax.data.draws import Draws
from engrax.data.haystack import NOISE, load_text, made_words, sentences
from engrax.data.niah import DEPTHS
from engrax.tests.test_needles import BABI, NEEDLES, assert_share, build, examples

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
