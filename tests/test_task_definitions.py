"""The rows of the tasks against their definitions: rows written by hand, slow parsers, and known frequencies."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from engrax import data
from engrax.data.token_types import TokenTypes
from engrax.errors import UserError
from engrax.evals.continual import stability_gap

MANY = 4000


def rows_of(task, count=MANY, split="train"):
    return task.generate(split, np.arange(count))


def slices_of(task, tokens, targets) -> TokenTypes:
    return task.slices({"tokens": tokens, "targets": targets, "segment_ids": np.zeros_like(tokens)})


def assert_share(hits, expected):
    """The share of true values is the expected one, within 5 standard errors."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - expected) < 5 * np.sqrt(expected * (1 - expected) / hits.size) + 1e-12


@pytest.mark.parametrize(
    "task, row, answers",
    [
        # keys 1 and 3, values 9, 8; key 3 is bound again, to 12; -1 where nothing is known
        (data.ForgettingMQAR(num_pairs=2, num_updates=1, vocab_size=14, seq_len=12),
         [1, 9, 3, 8, 3, 12, 3, 0, 2, 5, 1, 9], [9, -1, 12, -1, 12, -1, 12, -1, -1, -1, 9, -1]),
        # keys (1, 4), (1, 5), (2, 5), (2, 4); asked are (2, 5) and (1, 5); (4, 5) is no key
        (data.CompositionalMQAR(num_pairs=4, vocab_size=13, seq_len=24),
         [1, 4, 9, 1, 5, 12, 2, 5, 8, 2, 4, 10, 2, 5, 0, 4, 5, 0, 1, 5, 0, 0, 0, 0],
         [-1] * 13 + [8, -1, -1, -1, -1, -1, 12, -1, -1, -1, -1]),
        (data.InContextRecall(vocab_size=8, seq_len=10),
         [0, 5, 1, 7, 0, 5, 3, 5, 1, 7], [-1] * 4 + [5, -1, -1, -1, 7, -1]),
        # noise 4 and 5; keys 0 and 1, values 2 and 3
        (data.NoisyInContextRecall(vocab_size=6, noise_vocab=2, seq_len=8),
         [1, 3, 5, 5, 4, 5, 1, 3], [-1] * 6 + [3, -1]),
        # PAD; key (0, 1) with value (4, 3), key 0 with 5, then key (0, 1): after its 0, the value of key 0 is known
        (data.FuzzyInContextRecall(vocab_size=7, key_size=2, value_size=2, seq_len=12),
         [6, 6, 6, 0, 1, 4, 3, 0, 5, 0, 1, 4], [-1] * 9 + [5, 4, 3]),
        (data.Compression(vocab_size=4, seq_len=6), [2, 0, 2, 3, 3, 3], [-1, -1, -1, 2, 0, 2]),
        (data.Palindrome(vocab_size=9, seq_len=6), [4, 7, 5, 0, 5, 7], [-1, -1, -1, 5, 7, 4]),
        (data.SelectiveCopying(vocab_size=5, num_tokens=2, seq_len=8), [3, 2, 3, 0, 4, 3, 3, 3], [-1] * 6 + [2, 0]),
        (data.SelectiveCopying(vocab_size=5, num_tokens=2, seq_len=6, form="mamba"),
         [1, 3, 1, 3, 4, 4], [-1] * 4 + [1, 1]),
        # stacks 3 and 4: push 7 and 6 on 3, push 5 on 4, pop 6, pop 5, pop 7
        (data.Stack(num_stacks=2, vocab_size=8, seq_len=20),
         [1, 3, 7, 1, 3, 6, 1, 4, 5, 2, 3, 6, 2, 4, 5, 2, 3, 7, 0, 0],
         [-1] * 10 + [6, -1, -1, 5, -1, -1, 7, -1, -1, -1]),
        # keys of two symbols: (4, 5) -> 6, (4, 5) -> 5, (5, 4) -> 7; asked (4, 5)
        (data.AssociativeRetrieval(num_pairs=3, key_size=2, vocab_size=8, seq_len=20),
         [4, 5, 1, 6, 3, 4, 5, 1, 5, 3, 5, 4, 1, 7, 3, 4, 5, 2, 0, 0], [-1] * 17 + [5, -1, -1]),
        (data.Induction(vocab_size=6, seq_len=7), [3, 0, 5, 1, 2, 5, 0], [-1] * 6 + [5]),
        # labels 3 even, 4 odd
        (data.Parity(seq_len=6), [1, 2, 2, 2, 1, 0], [3, 4, 3, 4, 4, -1]),
        # labels 3 "a or b", 4 b, 5 end; then 4 "a or b", 5 b, 6 c, 7 end
        (data.Counters(seq_len=7), [1, 1, 1, 2, 2, 2, 0], [3, 3, 3, 4, 4, 5, -1]),
        (data.Counters(kinds=3, seq_len=7), [1, 1, 2, 2, 3, 3, 0], [4, 4, 5, 6, 6, 7, -1]),
        # ( = 1, [ = 2, ) = 3, ] = 4; labels 5 end, 6 ")", 7 "]":  ( [ ] ) [ ]
        (data.Dyck(kinds=2, seq_len=8), [1, 2, 4, 3, 2, 4, 0, 0], [6, 7, 6, 5, 7, 5, -1, -1]),
        # labels 5 end, 6 ")", 7 "]", 8 both:  ( [ ) ] [ ]
        (data.Shuffle(kinds=2, seq_len=7), [1, 2, 3, 4, 2, 4, 0], [6, 8, 7, 5, 7, 5, -1]),
        # A: "B is a knight". B: "C is a knave". C: "A is a knight and B is a knave". A and B are alike, so C lies, so B
        # and A are knights.
        (data.KnightsAndKnaves(people=3, seq_len=22),
         [8, 3, 9, 1, 0, 0, 9, 3, 10, 2, 0, 0, 10, 4, 8, 1, 9, 2, 8, 9, 10, 0], [-1] * 18 + [1, 1, 2, -1]),
    ],
)  # fmt: skip
def test_rows_written_by_hand_have_the_answers_written_by_hand(task, row, answers):
    assert task.solve(np.array([row], np.int32)).tolist() == [answers]


def test_forgetting_mqar():
    task = data.ForgettingMQAR(num_pairs=3, num_updates=2, seq_len=32, vocab_size=24)
    tokens, targets = rows_of(task)
    names, index = slices_of(task, tokens, targets)
    for row, target, types in zip(tokens[:300], targets, index):
        keys, updated, values = list(row[0:6:2]), list(row[6:10:2]), list(row[1:10:2])
        assert len(set(keys)) == 3 and len(set(updated)) == 2 and set(updated) < set(keys) and len(set(values)) == 5
        assert 1 <= min(keys) and max(keys) < 12 <= min(values)
        last = dict(zip(keys + updated, values))
        asked = np.flatnonzero(target >= 0)
        assert sorted(row[asked]) == sorted(keys) and (asked >= 10).all() and (asked % 2 == 0).all()
        assert {k: v for k, v in zip(row[asked], target[asked])} == last
        for place in asked:
            assert names[types[place]] == ("updated" if row[place] in updated else "untouched")
    assert_share(tokens[:, 6] == tokens[:, 0], 1 / 3)  # the first update is of each key equally often
    assert_share(tokens[:, 8] == tokens[:, 0], 1 / 3)


def test_compositional_mqar():
    task = data.CompositionalMQAR(num_pairs=4, vocab_size=16, seq_len=36)
    tokens, targets = rows_of(task)
    for row, target in zip(tokens[:300], targets):
        first, second, values = row[0:12:3], row[1:12:3], row[2:12:3]
        assert len(set(first)) == len(set(second)) == 2 and len(set(zip(first, second))) == len(set(values)) == 4
        assert 1 <= first.min() and first.max() < 5 <= second.min() and second.max() < 10 <= values.min()
        asked = np.flatnonzero(target >= 0)
        assert (asked % 3 == 1).all() and (asked > 12).all()
        bound = {(a, b): v for a, b, v in zip(first, second, values)}
        assert {(row[t - 1], row[t]): target[t] for t in asked} == bound
    assert_share(tokens[:, 0] == tokens[:, 3], 1 / 3)  # after a key, one of three others has the same first half


def test_query_slots_of_the_family_follow_the_power_law():
    """Slots i = 1, 2, 3 with weights i^(a - 1): for a = 0.5 these are 1, 0.7071, 0.5774; their shares by hand."""
    for task, context, width in (
        (data.MQAR(num_pairs=1, seq_len=8, power_a=0.5), 2, 2),
        (data.ForgettingMQAR(num_pairs=1, num_updates=0, seq_len=8, power_a=0.5), 2, 2),
        (data.CompositionalMQAR(num_pairs=1, seq_len=12, power_a=0.5), 4, 3),
    ):
        _, targets = rows_of(task)
        slot = (np.nonzero(targets >= 0)[1] - context) // width
        for i, share in enumerate((0.4377, 0.3095, 0.2527)):
            assert_share(slot == i, share)


def test_in_context_recall():
    """Two keys, two values, three pairs: the second key repeats the first with 1/2, and the last always repeats one."""
    task = data.InContextRecall(vocab_size=4, seq_len=6)
    tokens, targets = rows_of(task)
    k, v = tokens[:, ::2], tokens[:, 1::2]
    assert k.max() == 1 and v.min() == 2
    assert_share(k[:, 0] == 0, 0.5)
    assert_share(v[:, 0] == 2, 0.5)
    assert_share(k[:, 1] == k[:, 0], 0.5)
    assert_share((v[:, 0] == v[:, 1])[k[:, 0] != k[:, 1]], 0.5)
    assert (v[:, 1] == v[:, 0])[k[:, 0] == k[:, 1]].all()
    assert_share((k[:, 2] == k[:, 0])[k[:, 0] != k[:, 1]], 0.5)
    assert (k[:, 2] == k[:, 0])[k[:, 0] == k[:, 1]].all()
    wanted = np.full_like(targets, -1)
    wanted[:, 4] = tokens[:, 5]
    wanted[:, 2] = np.where(k[:, 0] == k[:, 1], v[:, 1], -1)
    np.testing.assert_array_equal(targets, wanted)


def test_training_may_predict_every_next_token():
    for name in ("InContextRecall", "FuzzyInContextRecall"):
        task = getattr(data, name)(train_labels="all", seq_len=32)
        tokens, targets = rows_of(task, 50)
        np.testing.assert_array_equal(targets[:, :-1], tokens[:, 1:])
        assert (targets[:, -1] == -1).all()
        for own, other in zip(
            rows_of(task, 50, "validation"), rows_of(getattr(data, name)(seq_len=32), 50, "validation")
        ):
            np.testing.assert_array_equal(own, other)


def test_noise_replaces_pairs():
    """Four pairs, noise 0.6: the last is never noise, one of the others never; each of them is with 0.6 x 2/3."""
    task = data.NoisyInContextRecall(vocab_size=12, noise_vocab=5, noise=0.6, seq_len=8)
    tokens, targets = rows_of(task)
    noise = tokens >= 7
    np.testing.assert_array_equal(noise[:, ::2], noise[:, 1::2])
    assert not noise[:, 6].any() and not noise[:, :6:2].all(axis=1).any()
    for pair in range(3):
        assert_share(noise[:, 2 * pair], 0.4)
    assert_share(tokens[:, 0][noise[:, 0]] == 7, 1 / 5)
    assert (targets[:, 6] == tokens[:, 7]).all() and (targets[noise] == -1).all()
    for row, target in zip(tokens[:300], targets):
        shown = {}
        for t in range(0, 8, 2):
            assert target[t] == shown.get(row[t], -1)
            if row[t] < 7:
                shown[row[t]] = row[t + 1]


def parse_motifs(row, keys, pad):
    """[(key motif, value motif, place of the value)] of a fuzzy row."""
    found, t = [], int(np.argmax(row != pad))
    while t < len(row):
        k = t
        while row[k] < keys:
            k += 1
        v = k
        while v < len(row) and keys <= row[v] < pad:
            v += 1
        found.append((tuple(row[t:k]), tuple(row[k:v]), k))
        t = v
    return found


@pytest.mark.parametrize("split", ["train", "validation"])
def test_fuzzy_in_context_recall(split):
    task = data.FuzzyInContextRecall(vocab_size=8, key_size=2, value_size=3, seq_len=40)
    tokens, targets = rows_of(task, split=split)
    first = []
    for row, target in zip(tokens[:1500], targets):
        motifs = parse_motifs(row, 3, 7)
        first.append(motifs[0][:2])
        wanted, shown = np.full(40, -1), {}
        for key, value, place in motifs:
            assert len(set(key)) == len(key) <= 2 and len(set(value)) == len(value) <= 3
            assert shown.get(key, value) == value
            if key in shown:
                wanted[place - 1 : place - 1 + len(value)] = value
            shown[key] = value
        np.testing.assert_array_equal(target, wanted)
        assert motifs[-1][0] in {key for key, *_ in motifs[:-1]}
        assert (row == 7).sum() < 10  # two pairs of the largest size would fit no more
    keys, values = zip(*first)
    sizes = [len(key) for key in keys]
    assert_share(np.equal(sizes, 2), 0.5 if split == "train" else 1 - 1e-9)
    assert_share([len(value) == 1 for value in values], 1 / 3)
    assert_share([key == (2, 0) for key in keys if len(key) == 2], 1 / 6)  # all orders of two of three
    assert_share([value == (5, 3) for value in values if len(value) == 2], 1 / 12)


def test_memorization_has_one_map_for_both_splits():
    task = data.Memorization(vocab_size=10, seq_len=6)  # keys 0 to 3, values 4 to 8, INSERT 9
    facts = {}
    for split in ("train", "validation"):
        tokens, targets = rows_of(task, split=split)
        assert (tokens[:, 1::2] == 9).all() and tokens[:, ::2].max() == 3 and (targets[:, ::2] == -1).all()
        assert_share(tokens[:, 0] == 2, 1 / 4)
        for key, value in zip(tokens[:, ::2].ravel(), targets[:, 1::2].ravel()):
            assert facts.setdefault(int(key), int(value)) == value
    assert len(set(facts.values())) == 4 and set(facts.values()) <= {4, 5, 6, 7, 8}
    maps = {tuple(dataclasses.replace(task, seed=seed).facts) for seed in range(40)}
    assert len(maps) > 25  # of 120


def test_selective_copying_places():
    """MAD: two blanks go before token 1 or 2 with 1/2 each, token 2 stands last. Mamba: six equal sets of places."""
    task = data.SelectiveCopying(vocab_size=12, num_tokens=2, seq_len=7)
    tokens, targets = rows_of(task)
    assert (tokens[:, 4] == 11).all() and (tokens[:, 5:] == 10).all() and (tokens[:, 3] < 10).all()
    for place, share in enumerate((0.25, 0.5, 0.25)):
        assert_share(tokens[:, place] < 10, share)
    assert_share(targets[:, 5] == 3, 1 / 10)
    np.testing.assert_array_equal(targets[:, 6], tokens[:, 3])
    tokens, targets = rows_of(dataclasses.replace(task, form="mamba", seq_len=6))
    assert (tokens[:, 4:] == 11).all() and ((tokens[:, :4] < 10).sum(axis=1) == 2).all()
    for pair in itertools.combinations(range(4), 2):
        assert_share((tokens[:, list(pair)] < 10).all(axis=1), 1 / 6)


def test_stacks_are_last_in_first_out():
    tokens, targets = rows_of(data.Stack(num_stacks=3, vocab_size=12, seq_len=50), 400)
    pops = 0
    for row, target in zip(tokens, targets):
        stacks, wanted = collections.defaultdict(list), np.full(50, -1)
        assert not row[48:].any()
        for t in range(0, 48, 3):
            operation, stack, element = row[t : t + 3]
            assert 3 <= stack < 6 <= element < 12
            if operation == 2:
                wanted[t + 1] = stacks[stack].pop()
                assert element == wanted[t + 1]
                pops += 1
            else:
                assert operation == 1
                stacks[stack].append(element)
        np.testing.assert_array_equal(target, wanted)
    assert_share(tokens[:, 3] == 2, 1 / 6)  # the second operation: the same stack of three, and a POP
    assert 2000 < pops < 3200


def test_associative_retrieval_by_frequencies():
    """Two keys, two segments: the same key twice with 1/2, else each of both is asked with 1/2."""
    task = data.AssociativeRetrieval(num_pairs=2, vocab_size=6, seq_len=10)
    tokens, targets = rows_of(task)
    assert (tokens[:, [1, 5]] == 1).all() and (tokens[:, [3, 7]] == 3).all() and (tokens[:, 9] == 2).all()
    same = tokens[:, 0] == tokens[:, 4]
    assert_share(same, 0.5)
    assert_share((tokens[:, 8] == tokens[:, 0])[~same], 0.5)
    wanted = np.where(tokens[:, 8] == tokens[:, 4], tokens[:, 6], tokens[:, 2])
    np.testing.assert_array_equal(targets[:, 9], wanted)
    names, index = slices_of(task, tokens, targets)
    assert [names[i] for i in index[:, 9]] == ["rewritten" if twice else "bound once" for twice in same]
    tokens, _ = rows_of(data.AssociativeRetrieval(num_pairs=4, vocab_size=8, seq_len=20, keys="distinct"))
    assert (np.sort(tokens[:, :16:4], axis=1) == [4, 5, 6, 7]).all()


def test_induction_places():
    tokens, targets = rows_of(data.Induction(vocab_size=6, seq_len=7))
    assert ((tokens == 0).sum(axis=1) == 2).all() and (tokens[:, -1] == 0).all()
    for place in range(5):
        assert_share(tokens[:, place] == 0, 1 / 5)
    assert_share(targets[:, -1] == 4, 1 / 5)


def worlds(puzzle, people):
    """All assignments (True = knight) in which everybody speaks as he is."""
    for world in itertools.product((False, True), repeat=people):
        role = dict(zip(range(8, 8 + people), world))
        for speaker, op, a, r, b, s in puzzle:
            first, second = role[a] == (r == 1), b and role[b] == (s == 1)
            says = {3: first, 4: first and second, 5: first or second, 6: not first or second, 7: first == second}[op]
            if says != role[speaker]:
                break
        else:
            yield world


def test_knights_by_enumeration():
    task = data.KnightsAndKnaves(train_examples=150)
    held = {kind: dataclasses.replace(task, validation=kind) for kind in ("trained", "perturbed", "reordered")}
    trained = rows_of(task, 150)
    rows = {kind: rows_of(other, 150, "validation") for kind, other in held.items()}
    for own, other in zip(trained, rows["trained"]):
        np.testing.assert_array_equal(own, other)
    new, _ = rows_of(task, 150, "validation")
    assert not (new == trained[0]).all(axis=1).any()
    changed = collections.Counter()
    for i in range(150):
        puzzles = {kind: (tokens[i, :24].reshape(4, 6), targets[i]) for kind, (tokens, targets) in rows.items()}
        for kind, (puzzle, target) in puzzles.items():
            (world,) = worlds(puzzle.tolist(), 4)
            assert target[24:].tolist() == [1 if knight else 2 for knight in world] and (target[:24] == -1).all()
            assert all(len({line[0], line[2], line[4]}) == 3 for line in puzzle), kind
            assert all((line[1] == 3) == (line[4] == 0) == (line[5] == 0) for line in puzzle)
        (old, answer), (other, new_answer), (mixed, same) = puzzles.values()
        assert ((old != other).any(axis=1)).sum() == 1 and (answer != new_answer).any()
        changed[int(np.argmax((old != other).any(axis=1)))] += 1
        assert sorted(map(tuple, old)) == sorted(map(tuple, mixed)) and (same == answer).all()
    assert len(changed) == 4 and (rows["reordered"][0] != trained[0]).any()
    ops = np.bincount(trained[0][:, 1:24:6].ravel(), minlength=8)[3:]
    assert ops.min() > 60  # of 600, five kinds


def test_puzzles_that_no_single_statement_turns_are_perturbed_by_two():
    """Row 186: by enumeration, no other statement of one person gives exactly one other solution."""
    task = data.KnightsAndKnaves()
    tokens, targets = task.generate("train", np.array([186]))
    puzzle = tokens[0, :24].reshape(4, 6).tolist()
    (world,) = worlds(puzzle, 4)
    for speaker in range(4):
        a_and_b = list(itertools.permutations([p for p in range(8, 12) if p != 8 + speaker], 2))
        two = itertools.product((4, 5, 6, 7), a_and_b, (1, 2), (1, 2))
        statements = [[8 + speaker, op, a, r, b, s] for op, (a, b), r, s in two]
        statements += [[8 + speaker, 3, a, r, 0, 0] for (a, _), r in itertools.product(a_and_b, (1, 2))]
        for statement in statements:
            found = list(worlds([statement if i == speaker else line for i, line in enumerate(puzzle)], 4))
            assert len(found) != 1 or found == [world]
    held = dataclasses.replace(task, validation="perturbed")
    perturbed, answers = held.generate("validation", np.array([186]))
    assert (perturbed[0, :24].reshape(4, 6) != puzzle).any(axis=1).sum() == 2
    (other,) = worlds(perturbed[0, :24].reshape(4, 6).tolist(), 4)
    assert other != world and (answers != targets).any()


def test_a_stream_gives_its_tasks_in_order():
    tasks = (data.MQAR(seq_len=16, num_pairs=2, vocab_size=10), data.Induction(seq_len=16, vocab_size=6))
    stream = data.Continual(tasks=tasks, seq_len=16, train_examples=9, validation_examples=6)
    tokens, targets = rows_of(stream, 9)
    second = tokens.min(axis=1) >= 10
    assert second.tolist() == [False] * 4 + [True] * 5  # 9 // 2 of the first
    assert tokens[second].max() < 16 and tokens[~second].max() < 10
    assert ((targets == -1) | ((targets >= 10) == second[:, None])).all()
    shown, _ = rows_of(stream, 6, "validation")
    assert (shown.min(axis=1) >= 10).tolist() == [False, True] * 3
    names, index = slices_of(stream, tokens, targets)
    assert names == ("task 0", "task 1") and ((index == -1) == (targets == -1)).all()
    assert (index.max(axis=1) == second).all()
    names = {row.tobytes(): i for i, row in enumerate(tokens)}
    orders = []
    for seed in range(4):
        batches = itertools.islice(stream.loader("train", batch_size=3, seed=seed), 3)
        orders.append([names[row.tobytes()] for batch in batches for row in batch["tokens"]])
        assert sorted(orders[-1][:4]) == [0, 1, 2, 3] and sorted(orders[-1][4:]) == [4, 5, 6, 7, 8]
    assert len(set(map(tuple, orders))) > 1
    again = data.Continual(tasks=(tasks[0], tasks[0]), seq_len=16)
    rows, _ = again.generate("validation", np.arange(40))
    assert len({(row % 10).tobytes() for row in rows}) == 40  # equal tasks have different examples
    seeded = dataclasses.replace(again, tasks=(tasks[0], dataclasses.replace(tasks[0], seed=1)))
    changed = (seeded.generate("validation", np.arange(40))[0] != rows).any(axis=1)
    assert changed.tolist() == [False, True] * 20


def test_the_stability_gap_of_a_curve_drawn_by_hand():
    accuracy = np.array(
        [[0.2, 0.0, 0.1], [0.9, 0.1, 0.0], [0.3, 0.5, 0.0], [0.8, 0.8, 0.1], [0.7, 0.4, 0.6], [0.6, 0.7, 0.9]]
    )
    gap = stability_gap(accuracy, np.array([1, 3, 5]))
    assert gap["min_accuracy"] == pytest.approx((0.3 + 0.4) / 2)
    assert gap["worst_case_accuracy"] == pytest.approx(0.9 / 3 + 2 / 3 * 0.35)
    assert gap["average_accuracy"] == pytest.approx((0.6 + 0.7 + 0.9) / 3)
    assert gap["forgetting"] == pytest.approx((0.3 + 0.1) / 2)
    for ends in ([3, 1, 5], [1, 5, 5]):
        with pytest.raises(UserError, match="one by one"):
            stability_gap(accuracy, np.array(ends))
    with pytest.raises(UserError, match="not 1 tasks"):
        stability_gap(accuracy[:, :1], np.array([5]))
