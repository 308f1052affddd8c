"""`make test-long` continues where it stopped, and its report says of every section what came of it."""

import json
import re
import shutil
import subprocess
import sys

import pytest

from engrax.tests.run_long import section_of

FAILS_ONCE = """
import pathlib
import pytest

@pytest.mark.long
@pytest.mark.parametrize("word", ["a b", "c"])
def test_one(word):
    assert word == "c" or not pathlib.Path("broken").exists()

def test_quick():
    raise AssertionError("not long")
"""


@pytest.fixture
def long_run(root, tmp_path):
    """Returns `run(*flags) -> (exit code, sections that it ran, the report's sections)` in a checkout of two files."""
    (tmp_path / "tests").mkdir()
    shutil.copy2(root / "tests" / "run_long.py", tmp_path / "tests")
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["long: everything else"]\n')
    (tmp_path / "tests" / "test_first.py").write_text(FAILS_ONCE)
    (tmp_path / "tests" / "test_second.py").write_text("import pytest\n@pytest.mark.long\ndef test_two():\n    pass\n")
    who = ["-c", "user.name=a", "-c", "user.email=b@c"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "first"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)

    def run(*flags):
        command = [sys.executable, "tests/run_long.py", "--output", "report.json", "-p", "no:cacheprovider", *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        ran = re.findall(r"^(\w+): \d tests$", done.stdout, re.MULTILINE)
        return done.returncode, ran, json.loads((tmp_path / "report.json").read_text())["sections"]

    return run


def test_it_continues_and_begins_again_after_a_change(long_run, tmp_path):
    (tmp_path / "broken").touch()
    code, ran, report = long_run()
    assert (code, ran) == (1, ["first", "second"])
    assert report["first"]["result"] == "failed" and report["first"]["tests"] == {"failed": 1, "passed": 1}
    assert report["second"]["result"] == "passed" and report["second"]["minutes"] < 2
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True).stdout.strip()
    assert report["second"]["commit"] == commit
    (tmp_path / "broken").unlink()
    code, ran, report = long_run()
    assert (code, ran, report["first"]["result"]) == (0, ["first"], "passed")
    (tmp_path / "new.py").touch()
    code, ran, report = long_run("--only", "sec")
    assert (code, ran) == (0, ["second"])
    assert report["first"]["commit"] == commit and report["second"]["commit"] == f"{commit} and changes"
    assert report["first"]["sources"] != report["second"]["sources"]
    assert long_run()[1] == ["first"] and long_run()[1] == []


def test_what_never_ran_comes_first(long_run):
    assert long_run("--only", "first")[2]["second"] == {"result": "not run"}
    assert long_run("--minutes", "0")[1] == []
    assert long_run()[1] == ["second"]


def test_the_laws_are_a_section_for_each_mixer_and_model():
    assert section_of("tests/test_laws.py::test_law[mixer-mamba20-state.start-deep]") == "laws mixer mamba2"
    assert section_of("tests/test_laws.py::test_exempt_laws_really_fail[model-hmt-1]") == "laws"
    assert section_of("tests/test_train_resume.py::test_killed[1]") == "train_resume"
