"""`make train` and `make test` find a Python, make their environment once, and do their steps in order."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A stand-in for Python that answers what launch/python.sh and launch/venv.sh ask, and notes what it is told to do.
PYTHON = """#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
case "$1 ${{2:-}}" in
    "-m venv") rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python"; echo "venv $here" >>"$NOTES" ;;
    "-m pip") shift 2; echo "pip $*" >>"$NOTES" ;;
    *base_prefix*) echo "/usr {version}" ;;
    "-c"*) {answer} ;;
    *) echo "python $*" >>"$NOTES" ;;
esac
"""


def fake_python(folder: Path, name: str, version: str, *, answer: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(PYTHON.format(version=version, answer=answer or f"echo {version}"))
    path.chmod(0o755)
    return path


def broken(folder: Path, name: str, reason: str, code: int = 127) -> Path:
    return fake_python(folder, name, "", answer=f"echo {reason!r} >&2; exit {code}")


@pytest.fixture
def shell(tmp_path):
    """Returns `run(*words, path=folders) -> finished` on a machine whose only Pythons are those made in tmp_path."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in (
        "sh",
        "bash",
        "make",
        "tr",
        "sed",
        "head",
        "cat",
        "cksum",
        "dirname",
        "mkdir",
        "rm",
        "cp",
        "grep",
        "find",
    ):
        (tools / tool).symlink_to(shutil.which(tool))

    def run(*words, path=(), cwd=ROOT):
        environment = {
            "PATH": ":".join(map(str, [*path, tools])),
            "HOME": str(tmp_path),
            "NOTES": str(tmp_path / "notes"),
        }
        command = [str(word) for word in words]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)

    return run


def notes(tmp_path) -> list[str]:
    file = tmp_path / "notes"
    return file.read_text().splitlines() if file.exists() else []


def test_the_newest_tested_python_that_runs_is_chosen(shell, tmp_path):
    broken(tmp_path / "shims", "python3.13", "pyenv: python3.13: command not found")
    broken(tmp_path / "old", "python3", "is Python 3.9", code=1)
    fake_python(tmp_path / "old", "python3.11", "3.11")
    fake_python(tmp_path / "old", "python3.14", "3.14")
    path = [tmp_path / "shims", tmp_path / "old"]
    found = shell("sh", "launch/python.sh", path=path)
    assert found.stdout.strip() == str(tmp_path / "old" / "python3.11"), found.stderr
    newer = fake_python(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin", "python3", "3.12")
    assert shell("sh", "launch/python.sh", path=path).stdout.strip() == str(newer)
    assert shell("sh", "launch/python.sh", "3.11", path=path).stdout.strip() == str(tmp_path / "old" / "python3.11")


def test_it_says_what_is_missing(shell, tmp_path):
    broken(tmp_path / "shims", "python3.13", "pyenv: python3.13: command not found")
    broken(tmp_path / "old", "python3", "lacks the module ensurepip", code=1)
    nothing = shell("sh", "launch/python.sh", path=[tmp_path / "shims", tmp_path / "old"])
    assert nothing.returncode == 1 and not nothing.stdout
    for words in ("pyenv: python3.13: command not found", "lacks the module ensurepip", "Install Python 3.13"):
        assert words in nothing.stderr
    made = shell("make", "test", path=[tmp_path / "shims", tmp_path / "old"], cwd=checkout(tmp_path))
    assert made.returncode != 0 and "Install Python 3.13" in made.stderr


@pytest.mark.parametrize("asked", ["3.10", "nonesuch", "old"])
def test_a_python_that_cannot_serve_is_refused(shell, tmp_path, asked):
    broken(tmp_path / "bin", "old", "is Python 3.9", code=1)
    fake_python(tmp_path / "bin", "python3.12", "3.12")
    refused = shell("sh", "launch/python.sh", asked, path=[tmp_path / "bin"])
    assert refused.returncode == 1 and refused.stderr.startswith(f"PYTHON={asked} cannot be used")


def checkout(tmp_path) -> Path:
    """What the Makefile needs of a checkout, in a folder whose name has a blank in it."""
    folder = tmp_path / "a checkout"
    (folder / "launch").mkdir(parents=True)
    for name in ("Makefile", "setup.py", "pyproject.toml", "launch/python.sh", "launch/venv.sh", "launch/minimums.py"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


def test_the_environment_is_made_once(shell, tmp_path):
    folder, path = checkout(tmp_path), [tmp_path / "bin"]
    fake_python(tmp_path / "bin", "python3.12", "3.12")

    def venv(*words):
        (tmp_path / "notes").unlink(missing_ok=True)
        finished = shell("sh", "launch/venv.sh", *words, path=path, cwd=folder)
        assert finished.returncode == 0, finished.stderr
        return notes(tmp_path)

    made, installed = venv(".venv", "test")
    assert made == f"venv {tmp_path / 'bin'}"
    assert installed.startswith("pip install") and installed.endswith("--editable .[test]")
    assert venv(".venv", "test") == [] and venv(".venv", "") == []
    assert venv(".venv", "test", "3.12") == [], "the Python asked for is the one it has"
    (installed,) = venv(".venv", "dev")
    assert installed.endswith(".[dev]")
    with open(folder / "setup.py", "a") as file:
        file.write("# another version\n")
    assert [line.split()[0] for line in venv(".venv", "test")] == ["pip"]
    fake_python(tmp_path / "bin", "python3.13", "3.13")
    assert [line.split()[0] for line in venv(".venv", "test", "3.13")] == ["venv", "pip"]
    folder = folder.rename(tmp_path / "moved")
    assert [line.split()[0] for line in venv(".venv", "test")] == ["venv", "pip"]


def test_the_lowest_versions_are_all_pinned(shell, tmp_path):
    fake_python(tmp_path / "bin", "python3.11", "3.11")
    fake_python(tmp_path / "bin", "python3.13", "3.13")
    finished = shell(
        "sh", "launch/venv.sh", "--lowest", ".low", "test", path=[tmp_path / "bin"], cwd=checkout(tmp_path)
    )
    assert finished.returncode == 0, finished.stderr
    assert "python3.11" in finished.stdout and any("minimums.txt" in note for note in notes(tmp_path))
    pins = subprocess.run(
        ["python3", "launch/minimums.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {"jax==0.10.2", "flax==0.12.8", "optax==0.2.8", "etils[epath]==1.12"} <= set(pins.splitlines())


def test_make_train_trains_evaluates_samples_and_points_to_the_report():
    planned = subprocess.run(["make", "-n", "train"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = ["venv.sh", "train quickstart", "evaluate", 'generate "runs/quickstart" --prompt "def "', "report.html"]
    places = [planned.index(step) for step in steps]
    assert places == sorted(places)


def continuous_integration(shell, tmp_path, make: str, *, lowest: bool = True):
    """Runs .ci/run with a stand-in for make, whose script notes what it is asked for."""
    fake_python(tmp_path / "bin", "python3.13", "3.13")
    if lowest:
        fake_python(tmp_path / "bin", "python3.11", "3.11")
    (tmp_path / "bin" / "make").write_text(f'#!/bin/sh\necho "make $*" >>"$NOTES"\n{make}\n')
    os.chmod(tmp_path / "bin" / "make", 0o755)
    return shell("bash", ROOT / ".ci" / "run", path=[tmp_path / "bin"])


@pytest.mark.parametrize("lowest", [True, False])
def test_continuous_integration_runs_the_quick_and_the_deep_tests(shell, tmp_path, lowest):
    finished = continuous_integration(shell, tmp_path, "echo 12 passed", lowest=lowest)
    assert finished.returncode == 0, finished.stderr
    sections = ["make test", "make test-deep", "make test-lowest"][: 2 + lowest]
    assert notes(tmp_path) == sections
    lines = finished.stdout.splitlines()
    assert lines[-len(sections) :] == [f"{section}: 0.0 minutes, passed" for section in sections]
    assert lines.count("12 passed") == len(sections), "what pytest prints must be seen"


def test_continuous_integration_stops_at_the_first_failure(shell, tmp_path):
    finished = continuous_integration(shell, tmp_path, '[ "$1" != test-deep ] || exit 3')
    assert finished.returncode == 3 and notes(tmp_path) == ["make test", "make test-deep"]
    assert finished.stdout.splitlines()[-1] == "make test-deep: 0.0 minutes, failed with exit code 3"


def test_every_test_is_in_one_of_the_three_parts():
    """Quick tests are those without a marker of the other two; no other marker hides any.

    The variables that a surrounding make hands down are left out: with them, make names the folders it enters.
    """
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    planned = {
        target: subprocess.run(
            ["make", "-n", target], cwd=ROOT, env=alone, capture_output=True, text=True, check=True
        ).stdout
        for target in ("test", "test-deep", "test-long")
    }
    assert '-m "not deep and not long"' in planned["test"]
    assert planned["test-deep"].rstrip().endswith('-m "deep and not long"')
    assert "tests/run_long.py" in planned["test-long"] and "--output docs/test_long.json" in planned["test-long"]
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]["markers"]
    assert [marker.split(":")[0] for marker in markers] == ["deep", "long", "smoke"]
