"""Run folders and checkpoints from others: nothing outside is written or run, and nonsense gives one sentence."""

import json
import os
import shutil
import sys

import pytest
from etils import epath

import engrax
from engrax import cli, files, plugins
from engrax.data import TfdsText
from engrax.data.tokenizers import JsonTokenizer, load_tokenizer
from engrax.errors import UserError
from engrax.evals import trials
from engrax.models import imported
from engrax.registry import KINDS
from engrax.tests import run_folders
from engrax.tests.experiments import tiny
from engrax.train import experiment as experiments
from engrax.train import integrity, loop, metrics, run_lock, run_sources, runs
from engrax.train import resume as resume_
from engrax.train.checkpoint import Checkpoints
from engrax.train.trainer import Trainer

OUTSIDE = (
    "../outside/victim.safetensors",
    "..",
    ".",
    "",
    "/tmp/victim.safetensors",
    "a/../../victim.safetensors",
    "folder/victim.safetensors",
    "..\\outside\\victim.safetensors",
    "C:victim.safetensors",
    "victim.safetensors\0.txt",
    "config.json",
    "tokenizer.json",
    "x" * 300 + ".safetensors",
    None,
    7,
    ["victim.safetensors"],
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `run` (text, a tokenizer, a checkpoint), `published` (a checkpoint in two files) and `tuned`."""
    folder = tmp_path_factory.mktemp("made")
    run_folders.write_run(folder / "run", run_folders.text_experiment(folder))
    run_folders.write_tuned(folder)
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy that a test may damage, next to an empty folder `outside`."""
    shutil.copytree(made, tmp_path / "copy")
    (tmp_path / "outside").mkdir()
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def model(made):
    return imported.load(made / "published")


@pytest.fixture(scope="module")
def trainer(made):
    return Trainer(runs.open_run(made / "run").experiment)


def listing(folder):
    """{path: size} of everything in a folder."""
    return {str(path): path.lstat().st_size for path in sorted(folder.rglob("*"))}


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}

# Names that lead out of the folder.


def rename(value, name, keys):
    """The JSON value with `name` for every value under one of the keys."""
    if isinstance(value, dict):
        return {k: name if k in keys else rename(v, name, keys) for k, v in value.items()}
    return [rename(v, name, keys) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: files.short(name)[:20])
def test_an_export_writes_into_its_folder_alone(copied, model, name):
    path = copied / "tuned" / "pretrained" / "tensors.json"
    path.write_text(json.dumps(rename(json.loads(path.read_text()), name, {"file"})))
    before = listing(copied.parent)
    with pytest.raises(UserError):
        imported.export(model, copied / "out", like=copied / "tuned" / "pretrained")
    assert listing(copied.parent) == before


@pytest.mark.parametrize("name", OUTSIDE, ids=lambda name: files.short(name)[:20])
def test_an_index_names_files_of_its_folder_alone(copied, model, name):
    """huggingface/transformers#47176: weight_map values were joined to the folder unchecked."""
    path = copied / "published" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], name)}))
    shutil.copy(min((copied / "published").glob("*.safetensors")), copied.parent / "outside" / "victim.safetensors")
    with pytest.raises(UserError):
        imported.check(copied / "published", model.config)


@pytest.mark.parametrize(
    "place", ["config.json", "metrics.jsonl", "source", "evals", "checkpoints/4/state", "wandb", "x/y", "lock.json"]
)
@pytest.mark.parametrize("dangling", [False, True])
def test_no_link_in_a_run_folder_is_followed(copied, place, dangling):
    path = copied / "run" / place
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(copied.parent / "outside" / "moved")
    path.symlink_to(copied.parent / "outside" / ("nothing" if dangling else "moved"))
    with pytest.raises(UserError, match="symbolic link|holds no config.json"):
        runs.open_run(copied / "run")
    with pytest.raises(UserError, match="symbolic link"):
        loop.check(tiny(), runs.folder(copied / "run"))


def test_wandb_may_link_its_newest_log(copied):
    (copied / "run" / "wandb").mkdir()
    (copied / "run" / "wandb" / "latest-run").symlink_to("offline-run-1")
    runs.open_run(copied / "run")


def test_a_pipe_is_not_read(copied):
    (copied / "run" / "environment.json").unlink()
    os.mkfifo(copied / "run" / "environment.json")
    with pytest.raises(UserError, match="special file"):
        runs.open_run(copied / "run")


def test_what_is_written_goes_through_no_link(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "config.json.tmp").symlink_to(victim)
    files.write_atomically(tmp_path / "config.json", "{}")
    assert victim.read_text() == "precious" and (tmp_path / "config.json").read_text() == "{}"
    assert not (tmp_path / "config.json").is_symlink()


def test_the_cache_of_the_hub_is_read(copied, model):
    """Its snapshots are links to ../../blobs; any other link to a tensor file is refused."""
    cache, published = copied.parent / "models--x", copied / "published"
    (cache / "snapshots").mkdir(parents=True)
    shutil.copytree(published, cache / "blobs")
    (cache / "snapshots" / "abc").mkdir()
    for file in published.iterdir():
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    imported.check(cache / "snapshots" / "abc", model.config)
    (cache / "snapshots" / "abc").rename(cache / "elsewhere")
    with pytest.raises(UserError, match="is a symbolic link"):
        imported.check(cache / "elsewhere", model.config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name", ["os.system", "../outside/evil", "/tmp/evil.py", "__import__('os')", "evil", "a:b", ""]
)
def test_a_registered_name_is_looked_up_and_nothing_else(copied, kind, name, monkeypatch):
    """When every class of a config has such a name, then nothing is imported; one sentence names the unknown class."""
    (copied.parent / "outside" / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(copied.parent / "outside")
    monkeypatch.syspath_prepend(str(copied.parent / "outside"))
    path = copied / "run" / "config.json"
    path.write_text(json.dumps(rename(json.loads(path.read_text()), f"{kind}:{name}", {"type"})))
    before = set(sys.modules)
    with pytest.raises(UserError, match="unknown|cannot stand there"):
        runs.open_run(copied / "run")
    assert "evil" not in set(sys.modules) - before


def test_control_characters_of_a_strangers_file_do_not_reach_the_terminal(copied, capsys):
    path = copied / "run" / "config.json"
    path.write_text(path.read_text().replace("mixer:linear_attention", "mixer:\\u001b[31mlinear\\u0007"))
    assert cli.main(["evaluate", str(copied / "run")]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "\x07" not in told and "\\x1b[31mlinear" in told


# Python from others.


def test_a_tfds_folder_runs_no_class_but_those_of_tfds(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    (tmp_path / "evil_features.py").write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = {"pythonClassName": "evil_features.Text", "text": {}}
    features = {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict"}
    for version, whole in (
        ("1.0.0", features | {"featuresDict": {"features": {"text": text}}}),
        ("2.0.0", {"pythonClassName": "evil_features.Dict", "featuresDict": {"features": {}}}),
        ("3.0.0", {"type": "evil_features.Dict", "content": {}}),
    ):
        folder = tmp_path / "notes" / version
        folder.mkdir(parents=True)
        (folder / "features.json").write_text(json.dumps(whole))
        (folder / "dataset_info.json").write_text(json.dumps({"name": "notes", "version": version, "splits": []}))
        with pytest.raises(UserError, match="names the Python class 'evil_features"):
            TfdsText(name=f"notes:{version}", data_dir=str(tmp_path)).digest()
    assert "evil_features" not in sys.modules
    assert tfds.features.FeatureConnector.cls_from_name("tensorflow_datasets.core.features.text_feature.Text")


@pytest.mark.parametrize(
    "name",
    ["huggingface:glue", "kaggle:x", "hf:a/b", "../notes", "/tmp/notes", "notes/x=1,y=2", "notes/../x", "a b", "a\nb"],
)
def test_a_tfds_name_is_a_plain_one(name):
    with pytest.raises(UserError, match="cannot open the data set"):
        TfdsText(name=name)


@pytest.mark.parametrize("name", ["random", "json", "string", "_heapq", "token"])
def test_a_plugins_folder_does_not_shadow_the_standard_library(tmp_path, name, monkeypatch):
    """numpy/numpy#16753: numpy imported a random.py next to the user's file."""
    (tmp_path / f"{name}.py").write_text("raise SystemExit('executed')")
    (tmp_path / "helper.py").write_text("VALUE = 3\n")
    (tmp_path / "plugin.py").write_text(f"import {name}\nimport helper\nFOUND = {name}.__file__, helper.VALUE\n")
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    before = list(sys.path)
    file, value = plugins.load(tmp_path / "plugin.py").FOUND
    assert not file.startswith(str(tmp_path)) and value == 3
    assert sys.path == before


# Files that parse but make no sense.


def fuzz(path, call, each):
    """Damages one JSON file in all its places; returns the errors of `call()` that are no sentence, with the damage."""
    text, lines = path.read_text(), path.suffix == ".jsonl"
    whole = text.splitlines()[0] if lines else text
    wrong, refused = [], 0
    for what, changed in run_folders.damages(whole, each):
        path.write_text(f"{changed}\n{text}" if lines else changed)
        try:
            call()
        except UserError as error:
            refused += 1
            if "\n" in str(error).strip():
                wrong.append((what, str(error)))
        except Exception as error:
            wrong.append((what, repr(error)))
    path.write_text(text)
    assert refused, f"no damage to {path.name} was noticed"
    return wrong


def test_damaged_files_of_a_run_are_named_in_one_sentence(copied, trainer):
    run = copied / "run"
    experiment = runs.open_run(run).experiment

    def resume():
        sealed()
        data = trainer.loader("train")
        try:
            resume_.find(epath.Path(run)).restore(trainer.abstract_state(), data, None)
            next(data)
        finally:
            data.close()

    def sealed():
        """The run folder of someone who also wrote the digests."""
        integrity.seal(epath.Path(run / "checkpoints" / "4"))
        return Checkpoints(run)

    wrong = fuzz(run / "config.json", lambda: runs.open_run(run), 2)
    wrong += fuzz(run / "environment.json", lambda: runs.open_run(run), 1)
    wrong += fuzz(run / "metrics.jsonl", lambda: metrics.read(run), None)
    wrong += fuzz(run / "source" / "manifest.json", lambda: runs.open_run(run), None)
    wrong += fuzz(run / "checkpoints" / "4" / "metrics" / "metrics", lambda: sealed().resolve("best"), 6)
    wrong += fuzz(run / "checkpoints" / "4" / "data" / "metadata", resume, 5)
    lock = run / "lock.json"
    lock.write_text(json.dumps({"host": "elsewhere", "process": 3, "started": 5}))
    wrong += fuzz(lock, lambda: run_lock.refuse_other(runs.folder(run)), None)
    lock.unlink()
    assert not wrong, wrong[:5]
    assert runs.open_run(run).experiment == experiment


def test_damaged_files_of_a_published_checkpoint_are_named_in_one_sentence(copied):
    published, kept = copied / "published", copied / "tuned" / "pretrained"
    tensors = imported.files.TensorFiles

    wrong = fuzz(published / "config.json", lambda: imported.read_config(published), 6)
    wrong += fuzz(published / "model.safetensors.index.json", lambda: tensors(published), 1)
    wrong += fuzz(kept / "config.json", lambda: imported.read_config(kept), 3)
    wrong += fuzz(kept / "tensors.json", lambda: tensors(kept), 2)
    wrong += fuzz(kept / "model.safetensors.index.json", lambda: tensors(kept).index_of(set()), 1)
    assert not wrong, wrong[:5]


def test_a_damaged_tokenizer_is_named_in_one_sentence(tmp_path):
    """When its file still parses, then it is refused when it is read, or when it has no ids for a text."""
    path = run_folders.write_tokenizer(tmp_path / "tokenizer.json")
    whole = json.loads(path.read_text())
    whole["model"]["vocab"] = {"a": 0, "b": 1, "c": 2}
    whole["added_tokens"] = [{"id": 3, "content": "</s>", "special": True} | ADDED]
    path.write_text(json.dumps(whole))
    assert JsonTokenizer(str(path)).end_of_text == (3,)

    def read():
        tokenizer = JsonTokenizer(str(path))
        assert tokenizer.vocab_size >= 1 and len(tokenizer.encode("a!b")) >= 0 and tokenizer.end_of_text is not None

    assert not fuzz(path, read, 3)


@pytest.mark.parametrize("text", ["a\udcff", "\ud800b"])
def test_a_text_that_is_no_text(made, text):
    """A prompt with bytes that are not UTF-8 reaches Python as lone surrogates."""
    for file in (None, str(made / "tokenizer.json")):
        with pytest.raises(UserError, match="is no UTF-8"):
            load_tokenizer(file).encode(text)


def test_damaged_scores_of_a_comparison_are_named_in_one_sentence(tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"sums": [1.0, 2.0], "counts": [3, 4], "learnt_at": 5, "seconds": 0.5}))
    assert not fuzz(path, lambda: trials._read(files.read_json(path), path), None)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": 1' + "0" * 5000 + "}", "NaN", "", "\x00", "{} {}", '"text"'],
    ids=lambda text: text[:8],
)
def test_json_that_python_cannot_hold(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        files.read_json(tmp_path / "x.json")


def test_a_chunk_larger_than_its_array_is_refused_before_it_is_read(copied):
    tensorstore = pytest.importorskip("tensorstore")
    state = copied / "run" / "checkpoints" / "4" / "state"
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{state}/"}}).result()
    name = "params.embedding/.zarray"
    entry = json.loads(store.read(name).result().value)
    for chunks, told in (([1 << 22, 1 << 22], "chunks of"), ([], "chunks of"), ("x", "no readable metadata")):
        store.write(name, json.dumps(entry | {"chunks": chunks}).encode()).result()
        integrity.seal(epath.Path(state.parent))
        with pytest.raises(UserError, match=f"is damaged .*{told}"):
            engrax.load(copied / "run")
    store.write(name, json.dumps(entry | {"shape": [1 << 40, 1 << 40]}).encode()).result()
    integrity.seal(epath.Path(state.parent))
    with pytest.raises(UserError, match="belongs to another config"):
        engrax.load(copied / "run")


def test_a_header_that_claims_more_than_its_file_holds(copied, model):
    """A safetensors header is checked against the size of its file before the file is mapped."""
    path = min((copied / "published").glob("*.safetensors"))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name] |= {"shape": [1 << 40, 1 << 20], "data_offsets": [0, 1 << 62]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="is damaged"):
        imported.check(copied / "published", model.config)


def test_an_absurd_number_of_layers_takes_no_memory(copied, model):
    path = copied / "published" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2_000_000_000}))
    with pytest.raises(UserError, match="layers"):
        imported.check(copied / "published", imported.read_config(copied / "published"))


def test_run_sources_names_stay_inside(copied):
    for name in ("../x.py", "/tmp/x.py", "a/../../x.py", "a//x.py", "x\n.py"):
        (copied / "run" / "source" / "manifest.json").write_text(json.dumps({name: {"sha256": "0", "role": "plugin"}}))
        with pytest.raises(UserError, match="only plain names"):
            run_sources.read(runs.folder(copied / "run"))


def test_a_hint_to_paste_is_quoted(copied):
    path = copied / "run" / "source" / "manifest.json"
    path.write_text(json.dumps({"x.py; rm -rf ~": {"sha256": "0", "role": "plugin"}}))
    hint = run_sources.plugin_hint(runs.folder(copied / "run"))
    assert hint.endswith("x.py; rm -rf ~'") and "--plugin '" in hint


def test_a_config_of_the_wrong_shape_is_refused():
    config = experiments.to_dict(tiny())
    for change, told in (
        ({"steps": [1, 2]}, "steps"),
        ({"optimizer": config["model"]}, "cannot stand there"),
        ({"seed": 10**400}, "makes no sense"),
        ({"model": config["model"] | {"mixers": config["model"]["mixers"][0]}}, "mixers"),
    ):
        with pytest.raises(UserError, match=told):
            experiments.from_dict(config | change)


def test_files_of_one_name_are_modules_of_their_own(tmp_path):
    """A class finds its own module again, as pickling and `inspect` do, after another file of the same name was run."""
    modules = []
    for folder in ("mine", "yours"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "memory.py").write_text("class Memory:\n    pass\n")
        modules.append(plugins.load(tmp_path / folder / "memory.py"))
    assert [sys.modules[module.Memory.__module__] for module in modules] == modules
