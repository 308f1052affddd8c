"""A run folder can move: it has its tokenizer and the user's files, knows its data by digest, and has one writer."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys

import pytest

import engrax
from engrax import cli, plugins
from engrax.data import TextFolder
from engrax.errors import UserError
from engrax.tests import run_folders
from engrax.tests.experiments import tiny
from engrax.train import ParallelConfig, loop, run_lock, run_sources, runs, sharding
from engrax.train import experiment as experiments


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with texts, tokenizer.json and the run `run`, whose config had relative paths."""
    folder = tmp_path_factory.mktemp("made")
    experiment = run_folders.text_experiment(folder)
    before = os.getcwd()
    os.chdir(folder)
    try:
        relative = {"data.path": "texts", "data.tokenizer_file": "tokenizer.json"}
        run_folders.write_run(folder / "run", experiments.replace(experiment, relative))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def moved(made, tmp_path, monkeypatch):
    """Only the run, in another folder under another home; its texts and tokenizer are elsewhere or missing."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home)
    shutil.copytree(made / "run", tmp_path / "moved")
    path = tmp_path / "moved" / "config.json"
    path.write_text(path.read_text().replace(str(made), "/gone"))
    manifest = tmp_path / "moved" / "source" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(made), "/gone"))
    return tmp_path / "moved"


def test_paths_of_data_are_saved_absolute(made):
    data = json.loads((made / "run" / "config.json").read_text())["experiment"]["data"]
    assert data["path"] == str(made / "texts") and data["tokenizer_file"] == str(made / "tokenizer.json")
    given = {"data": TextFolder(path="~/texts"), "init_from": "published", "start_from": "gs://bucket/run"}
    found = experiments.with_absolute_paths(tiny(**given))
    assert found.data.path == os.path.expanduser("~/texts") and found.init_from == os.path.abspath("published")
    assert found.start_from == "gs://bucket/run"


def test_the_tokenizer_in_the_run_serves_where_the_original_is_gone(moved):
    """huggingface/transformers#15283: a saved tokenizer named a file of the machine where it was saved."""
    run = runs.open_run(moved)
    assert run.experiment.data.tokenizer_file.startswith(str(moved / "source"))
    assert run.experiment.data.tokenizer.encode("abc").tolist() == [64, 65, 66]
    shutil.move(moved, moved.parent / "again")  # once more, after a resume that saved the copy's path
    path = moved.parent / "again" / "config.json"
    path.write_text(path.read_text().replace("/gone/tokenizer.json", run.experiment.data.tokenizer_file))
    assert runs.open_run(moved.parent / "again").experiment.data.tokenizer.encode("a").tolist() == [64]


@pytest.mark.deep
def test_a_moved_run_generates_without_its_data_and_evaluates_with_them(moved, made, capsys):
    """tensorflow/tensorflow#9146: checkpoints saved under an absolute path could not be moved."""
    assert cli.main(["generate", str(moved), "--prompt", "hello", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("hello")
    args = ["evaluate", str(moved), "--only", "validation", "--batches", "1"]
    assert cli.main(args) == 2
    assert "/gone/texts" in capsys.readouterr().err
    assert cli.main([*args, "--data.path", str(made / "texts")]) == 0
    assert "warning" not in capsys.readouterr().err
    (moved.parent / "other").mkdir()
    (moved.parent / "other" / "x.txt").write_text("another text entirely " * 99)
    assert cli.main([*args, f"--data.path={moved.parent / 'other'}"]) == 0
    assert "the data is not what this run was trained on" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["the path", "a flag", "the copy"])
def test_another_tokenizer_of_the_same_size_is_refused(moved, made, capsys, where):
    other = run_folders.write_tokenizer(moved.parent / "other.json", backwards=True)
    args = ["evaluate", str(moved), "--data.path", str(made / "texts")]
    if where == "the path":  # the config's path has the data
        path = moved / "config.json"
        path.write_text(path.read_text().replace("/gone/tokenizer.json", str(other)))
    elif where == "a flag":
        args += ["--data.tokenizer-file", str(other)]
    else:
        shutil.copy(other, next((moved / "source").glob("tokenizer_*.json")))
    for command in (args, ["generate", str(moved), "--prompt", "x", *args[2:]]):
        assert cli.main(command) == 2
        assert "is not the tokenizer that this run was trained with" in capsys.readouterr().err


def test_resuming_with_another_tokenizer_is_refused(made, tmp_path):
    other = str(run_folders.write_tokenizer(tmp_path / "other.json", backwards=True))
    experiment = experiments.replace(runs.open_run(made / "run").experiment, {"data.tokenizer_file": other})
    with pytest.raises(UserError, match="is not the tokenizer"):
        runs.prepare(made / "run", experiment)


def test_moved_data_are_known_by_their_digest(made, tmp_path):
    """When texts or tokenizer are elsewhere, then a run resumes with them, but not with other texts."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "texts", tmp_path / "texts")
    shutil.copy(made / "tokenizer.json", tmp_path / "elsewhere.json")
    moved = {"data.path": str(tmp_path / "texts"), "data.tokenizer_file": str(tmp_path / "elsewhere.json")}
    experiment = experiments.replace(runs.open_run(made / "run").experiment, moved)
    assert runs.prepare(tmp_path / "run", experiment).experiment == experiment
    (tmp_path / "texts" / "0.txt").write_text("something else")
    with pytest.raises(UserError, match="has changed since it was started"):
        runs.prepare(tmp_path / "run", experiment)


def test_a_run_without_a_manifest_still_loads(made, tmp_path):
    """Runs of format 2 that are older than the copies of tokenizers."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "source")
    assert engrax.load(tmp_path / "run")[1] == 4
    assert runs.prepare(tmp_path / "run", runs.open_run(made / "run").experiment)
    assert run_sources.read(runs.folder(tmp_path / "run"))


def test_an_unknown_field_of_the_data_is_named(made, capsys):
    for args, told in (
        (["--data.pth", "x"], "did you mean 'data.path'?"),
        (["--data.seq-len", "many"], "--data.seq-len"),
        (["--model.dim", "8"], "unrecognized arguments"),
    ):
        assert cli.main(["evaluate", str(made / "run"), *args]) == 2
        assert told in capsys.readouterr().err
    with pytest.raises(UserError, match="data.pth is no field; did you mean 'path'"):
        engrax.evaluate(made / "run", data={"pth": "x"})


# The user's own files.

FILES = {
    "config.py": "import mixer\nfrom package import inner\n",
    "mixer.py": "from helper import VALUE\n",
    "helper.py": "def later():\n    import lazy\nVALUE = 1\n",
    "lazy.py": "import package.deep.leaf\n",
    "package/__init__.py": "",
    "package/inner.py": "from . import sibling\nfrom .deep import leaf\n",
    "package/sibling.py": "import config\n",
    "package/deep/leaf.py": "from ..other import x\n",
    "package/other.py": "x = 1\n",
    "package/unused.py": "",
    "unused.py": "",
    "json.py": "raise SystemExit\n",
    "broken.py": "def (:\n",
}


@pytest.fixture
def mine(tmp_path):
    for name, text in FILES.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    return tmp_path / "mine"


def test_the_files_that_a_users_file_imports(mine):
    found = {path.relative_to(mine).as_posix() for path in plugins.files_of(mine / "config.py")}
    assert found == set(FILES) - {"package/unused.py", "unused.py", "json.py", "broken.py"}
    (mine / "config.py").write_text(
        "import json, os, numpy, engrax\ntry:\n    import broken\nexcept SyntaxError: ...\n"
    )
    assert {path.name for path in plugins.files_of(mine / "config.py")} == {"config.py", "broken.py"}


def test_a_module_imported_by_name_at_run_time_counts(mine, monkeypatch):
    (mine / "config.py").write_text("import importlib\nimportlib.import_module('unused')\n")
    monkeypatch.delitem(sys.modules, "unused", raising=False)
    plugins.load(mine / "config.py")
    try:
        assert {path.name for path in plugins.files_of(mine / "config.py")} == {"config.py", "unused.py"}
    finally:
        del sys.modules["unused"]


def test_the_copies_run_where_the_originals_are_gone(mine, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    run_sources.copy(runs.folder(tmp_path / "run"), tiny(), mine / "config.py")
    manifest = run_sources.read(runs.folder(tmp_path / "run"))
    assert manifest["config.py"]["role"] == "config" and manifest["package/deep/leaf.py"]["role"] == "module"
    shutil.rmtree(mine)
    for name in ("mixer", "helper", "package"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = plugins.load(tmp_path / "run" / "source" / "config.py")
    try:
        assert module.mixer.VALUE == 1 and str(tmp_path / "run") in module.inner.leaf.__file__
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("mixer", "helper", "package")]:
            del sys.modules[name]


def test_a_changed_file_is_told(mine, tmp_path, capsys):
    run = runs.folder(tmp_path / "run")
    run.mkdir()
    run_sources.copy(run, tiny(), mine / "config.py")
    run_sources.copy(run, tiny(), mine / "config.py")
    run_sources.warn_of_changes(run, [run / "source" / "config.py"])
    assert not capsys.readouterr().err
    (mine / "helper.py").write_text("VALUE = 2\n")
    run_sources.copy(run, tiny(), mine / "config.py")
    assert "warning: helper.py has changed" in capsys.readouterr().err
    (run / "source" / "mixer.py").write_text("VALUE = 9\n")
    run_sources.warn_of_changes(run, [run / "source" / "mixer.py"])
    assert "was changed after the run copied it" in capsys.readouterr().err


# One process at a time.


def test_a_second_process_is_refused(tmp_path):
    run = runs.folder(tmp_path / "run")
    with run_lock.held(run):
        for call in (lambda: run_lock.refuse_other(run), lambda: loop.check(tiny(), run)):
            with pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()} is writing"):
                call()
        (run / "kept").write_text("x")
    assert [path.name for path in run.iterdir()] == ["kept"]


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path):
    """ChrisCummins/clgen#116: locks of crashed trainings blocked the next ones."""
    run = runs.folder(tmp_path / "run")
    run.mkdir()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for process, started in ((child.pid, None), (os.getpid(), 1), (10**30, 1), (0, 1)):
        lock = {"host": socket.gethostname(), "process": process, "started": started}
        (run / "lock.json").write_text(json.dumps(lock))
        with run_lock.held(run):
            assert json.loads((run / "lock.json").read_text())["process"] == os.getpid()


def test_the_same_job_started_elsewhere_takes_the_lock_over(tmp_path, monkeypatch, capsys):
    run = runs.folder(tmp_path / "run")
    run.mkdir()
    (run / "lock.json").write_text(json.dumps({"host": "elsewhere", "process": 3, "started": 1, "job": "77"}))
    for job in (None, "78"):
        monkeypatch.setenv("SLURM_JOB_ID", job) if job else monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        with pytest.raises(UserError, match="process 3 on elsewhere is writing"):
            run_lock.refuse_other(run)
    monkeypatch.setenv("ENGRAX_JOB", "77")
    with run_lock.held(run):
        assert json.loads((run / "lock.json").read_text())["job"] == "77"
    assert "taking over" in capsys.readouterr().err


@pytest.mark.parametrize("text", ['{"host": "elsewhere", "process": 3}', "{}", "", '{"host": 1, "process": "x"}'])
def test_a_lock_of_another_host_or_nobody_is_named(tmp_path, text):
    (tmp_path / "lock.json").write_text(text)
    with pytest.raises(UserError, match="delete that file"), run_lock.held(runs.folder(tmp_path)):
        pass
    assert (tmp_path / "lock.json").read_text() == text


def test_nothing_is_left_of_a_lock_without_a_run(tmp_path):
    with pytest.raises(RuntimeError), run_lock.held(runs.folder(tmp_path / "a" / "b")):
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_a_run_whose_writing_failed(tmp_path, monkeypatch):
    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_sources, "copy", fail)
    with pytest.raises(KeyboardInterrupt):
        runs.prepare(tmp_path / "run", tiny())
    assert not list(tmp_path.iterdir())


# Other devices.


@pytest.mark.parametrize(
    "parallel, devices, wanted",
    [
        (dict(data=2, fsdp=4), 8, (2, 4)),
        (dict(data=2, fsdp=4), 1, (-1, 1)),
        (dict(data=2, fsdp=4), 4, (-1, 4)),
        (dict(data=-1, fsdp=4), 6, (-1, 2)),
        (dict(data=8), 3, (-1, 1)),
        (dict(), 5, (-1, 1)),
        (dict(data=1, tensor=4, sequence=2), 8, (1, 1, 4, 2)),
        (dict(data=2, fsdp=2, tensor=4, sequence=2), 8, (-1, 1, 4, 2)),
        (dict(fsdp=4, tensor=2), 12, (-1, 2, 2, 1)),
        (dict(tensor=4), 2, (-1, 1, 2, 1)),
    ],
)
def test_a_mesh_that_fits_the_devices(parallel, devices, wanted):
    found = sharding.fitting(ParallelConfig(zero=3, **parallel), devices)
    wanted += (1,) * (4 - len(wanted))
    assert (found.data, found.fsdp, found.tensor, found.sequence, found.zero) == (*wanted, 3)
    assert math.prod(found.mesh_shape(devices)) == devices


def test_a_run_goes_on_with_the_devices_that_are_here(made, tmp_path, capsys, monkeypatch):
    shutil.copytree(made / "run", tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"data": -1,\n      "fsdp": 1', '"data": 2,\n      "fsdp": 4'))
    given = []

    def train(experiment, *args, **kwargs):
        given.append(experiment.parallel)
        return loop.Result(runs.folder(args[0]), 4, True, {})

    monkeypatch.setattr(loop, "train", train)
    assert cli.main(["train", str(tmp_path / "run")]) == 0
    assert (given[0].data, given[0].fsdp) == (-1, 1)
    assert "continues with --parallel.data -1 --parallel.fsdp 1" in capsys.readouterr().err
    monkeypatch.undo()
    assert cli.main(["train", str(tmp_path / "run"), "--parallel.fsdp", "8"]) == 2
    assert "set --parallel.fsdp to a divisor" in capsys.readouterr().err
