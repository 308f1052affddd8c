"""The formal languages: all their strings by enumeration, and the sets of symbols that may follow."""

import collections
import itertools

import numpy as np
import pytest

from engrax import data
from engrax.tests.test_task_definitions import assert_share, rows_of


def legal_next(strings):
    """{prefix: the symbols that follow it in some string, 0 for the end}."""
    found = collections.defaultdict(set)
    for string in strings:
        for t in range(len(string)):
            found[string[: t + 1]].add(string[t + 1] if t + 1 < len(string) else 0)
    return found


def bracket_strings(kinds, length, nested):
    """All balanced strings, opening brackets 1 to kinds, closing ones kinds + 1 to 2 kinds."""
    for string in itertools.product(range(1, 2 * kinds + 1), repeat=length):
        open_brackets, fine = [], True
        for symbol in string:
            if symbol <= kinds:
                open_brackets.append(symbol)
            elif nested and open_brackets[-1:] == [symbol - kinds]:
                open_brackets.pop()
            elif not nested and symbol - kinds in open_brackets:
                open_brackets.remove(symbol - kinds)
            else:
                fine = False
                break
        if fine and not open_brackets:
            yield string


@pytest.mark.parametrize(
    "cls, kinds, strings", [("Dyck", 1, 5), ("Dyck", 2, 40), ("Shuffle", 1, 5), ("Shuffle", 2, 70)]
)
def test_bracket_languages_hold_all_their_strings_and_say_what_may_follow(cls, kinds, strings):
    """All strings of six symbols by enumeration (Catalan(3) = 5 of one kind); labels name the sets that may follow."""
    task = getattr(data, cls)(kinds=kinds, seq_len=6)
    every = {n: set(bracket_strings(kinds, n, cls == "Dyck")) for n in (2, 4, 6)}
    assert len(every[6]) == strings
    longer = set(bracket_strings(kinds, 8, cls == "Dyck")) if kinds == 1 else set()
    follow = legal_next(set().union(*every.values(), longer))
    tokens, targets = rows_of(task)
    lengths = (tokens > 0).sum(axis=1)
    for n in (2, 4, 6):
        assert_share(lengths == n, 1 / 3)
        seen = collections.Counter(tuple(row[:n].tolist()) for row in tokens[lengths == n])
        assert set(seen) == every[n]
        if kinds == 1:
            for string in seen:
                share = seen[string] / (lengths == n).sum()
                assert abs(share - 1 / len(every[n])) < 0.06
    names = task.label_names
    for row, target in zip(tokens[:300], targets):
        for t in range((row > 0).sum()):
            closing = {s for s in follow[tuple(row[: t + 1].tolist())] if s > kinds}
            name = "close " + " or ".join(str(s - kinds - 1) for s in sorted(closing)) if closing else "end"
            if t < 3:  # after it all continuations are within the strings enumerated
                assert names[target[t] - 1 - 2 * kinds] == name
        assert (target[(row > 0).sum() :] == -1).all()


def test_counters_have_equal_blocks():
    for kinds, n in ((2, 5), (3, 3)):
        tokens, _ = rows_of(data.Counters(kinds=kinds, seq_len=10))
        strings = {tuple(row[row > 0].tolist()) for row in tokens}
        assert strings == {tuple(s for s in range(1, kinds + 1) for _ in range(i)) for i in range(1, n + 1)}


def test_parity_strings_are_uniform():
    tokens, targets = rows_of(data.Parity(seq_len=20, shortest=20))
    assert (tokens > 0).all()
    assert_share(tokens == 2, 0.5)
    np.testing.assert_array_equal(targets, 3 + np.cumsum(tokens == 2, axis=1) % 2)
