"""Several processes compare what must be equal, and all refuse in the same words."""

import dataclasses
import itertools
import json

import pytest

from engrax.data import TextFolder
from engrax.errors import UserError
from engrax.tests.experiments import tiny
from engrax.train import agreement, distributed, runs


class Store(dict):
    """The key-value store of the coordination service, in this process."""

    key_value_set = dict.__setitem__

    def blocking_key_value_get(self, key, milliseconds):
        return self[key]


@pytest.fixture
def verdicts(monkeypatch):
    """Returns `verdicts(facts of process 0, of process 1, call)`: what `call` raises in each, None where it agrees."""

    def of(*facts, call=agreement.check):
        store, found = Store({"engrax/agreement/0/1": json.dumps(facts[1])}), []
        monkeypatch.setattr(distributed, "store", lambda: store)
        for me in range(2):
            monkeypatch.setattr(distributed, "processes", lambda me=me: (me, 2))
            monkeypatch.setattr(agreement, "_round", itertools.count())
            try:
                found.append(call(facts[me]))
            except UserError as error:
                found.append(str(error))
        return found

    return of


def test_equal_facts_agree(verdicts):
    assert verdicts({"jax": "1", "data_digest": "a"}, {"jax": "1", "data_digest": "a"}) == [None, None]


@pytest.mark.parametrize("name", ["data_digest", "jax", "commit", "python"])
def test_both_refuse_in_the_same_words(verdicts, name):
    told = verdicts({"jax": "1", "seed": 0, name: "ours"}, {"jax": "1", "seed": 0, name: "theirs"})
    assert told[0] == told[1] and "\n" not in told[0]
    assert f"process 1 in {name} (theirs, not ours)" in told[0]


def test_a_fact_that_one_lacks_and_many_differences_are_told(verdicts):
    ours = {f"field{i}": i for i in range(9)}
    told, _ = verdicts(ours, {"more": 1})
    assert "field0 (None, not 0)" in told and "6 more" in told


def test_data_and_versions_are_compared_before_a_run_folder_is_written(monkeypatch, tmp_path):
    seen = []

    def check(facts):
        assert not (tmp_path / "run").exists()
        seen.append(facts)

    monkeypatch.setattr(agreement, "check", check)
    experiment = tiny()
    runs.prepare(tmp_path / "run", experiment)
    assert {"engrax", "jax", "python", "commit"} < seen[0].keys()
    assert seen[0]["data_digest"] == experiment.data.digest()


def test_fields_are_compared_and_paths_of_data_are_not(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(agreement, "check", seen.append)
    monkeypatch.setattr(distributed, "processes", lambda: (0, 2))
    experiment = dataclasses.replace(tiny(), data=TextFolder(path="here", seq_len=16))
    data = dataclasses.replace(experiment.data, path="elsewhere")
    for other in (experiment, dataclasses.replace(experiment, data=data, seed=7)):
        agreement.check_experiment(other, tmp_path, 4, None)
    first, second = seen
    assert first["newest checkpoint"] == 4 and first["seed"] != second["seed"]
    assert {k: v for k, v in first.items() if k != "seed"} == {k: v for k, v in second.items() if k != "seed"}
