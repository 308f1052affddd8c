"""The types that the data sets give their tokens."""

import string

import numpy as np

from engrax.data import MQAR, ByteTokenizer, SetDisjointness
from engrax.data.set_disjointness import ASK, SEP
from engrax.data.token_types import frequent_types


def batch_of(task, count=60):
    tokens, targets = task.generate("train", np.arange(count))
    return {"tokens": tokens, "targets": targets, "segment_ids": np.zeros_like(tokens)}


def test_bytes_have_the_types_that_their_characters_have():
    names, index = ByteTokenizer().token_types(np.arange(256)[None])
    of = dict(zip(range(256), (names[i] for i in index[0])))
    for characters, name in (
        (string.ascii_lowercase, "lower case"),
        (string.ascii_uppercase, "upper case"),
        (string.digits, "digit"),
        (" \t", "space, tab"),
        ("\n\r", "newline"),
        ("()[]{}", "bracket"),
        ("\"'`", "quote"),
    ):
        assert {of[ord(c)] for c in characters} == {name}
    assert {of[ord(c)] for c in string.punctuation} == {"bracket", "quote", "operator", "other punctuation"}
    assert {of[b] for b in (0, 27, 127, *range(128, 256))} == {"other"}


def test_a_tasks_types_are_the_parts_of_its_rows():
    task = MQAR(seq_len=32, num_pairs=3, vocab_size=16, num_passes=2)
    batch = batch_of(task)
    names, index = task.token_types(batch)
    kinds = np.array(names)[index]
    assert np.all(kinds[:, :12:2] == "key") and np.all(kinds[:, 1:12:2] == "value")
    assert np.array_equal(kinds[:, 12:] == "query", batch["targets"][:, 12:] >= 0)
    assert set(kinds[:, 12:].ravel()) == {"query", "filler"}
    task = SetDisjointness(seq_len=20, small=2, large=6, vocab_size=32, num_passes=2)
    batch = batch_of(task)
    names, index = task.token_types(batch)
    for row, kinds in zip(batch["tokens"], np.array(names)[index]):
        first = list(row).index(SEP)
        wanted = ["first set"] * first + ["end of a set"] + ["second set"] * (8 - first)
        assert kinds.tolist() == [*wanted, "end of a set", *wanted, "question"]
        assert row[-1] == ASK


def test_where_nothing_is_known_the_most_frequent_tokens_are_types():
    tokens = np.array([[7, 7, 7, 3, 3, *range(20, 40)], [3, 9] + [0] * 23])
    real = np.arange(25) < [[25], [2]]
    names, index = frequent_types(tokens, real, lambda token: f"<{token}>")
    assert names[:2] == ("<3>", "<7>") and names[-1] == "all others" and len(names) == 13
    assert index[0, :5].tolist() == [1, 1, 1, 0, 0] and "<0>" not in names
    assert {names[i] for i in index[0, 15:]} == {"all others"}


def test_tokens_of_a_file_are_named_by_their_text(tmp_path):
    from tokenizers import Tokenizer, models

    from engrax.data import TextFolder

    Tokenizer(models.WordLevel({"und": 0, "oder": 1, "?": 2}, unk_token="?")).save(str(tmp_path / "tokenizer.json"))
    data = TextFolder(path=str(tmp_path), tokenizer_file=str(tmp_path / "tokenizer.json"), seq_len=4)
    tokens = np.array([[1, 1, 0, 2]])
    names, index = data.token_types({"tokens": tokens, "targets": tokens, "segment_ids": 0 * tokens})
    assert names == ("'oder'", "'und'", "'?'", "all others") and index.tolist() == [[0, 0, 1, 2]]
