"""Adding is one file: a mixer, a model, a data set, an optimizer, a schedule, an evaluator, in the package or outside.

`FILES` holds one file of each kind. All of them meet in one run, which is trained, evaluated, sampled and opened again
in a fresh process.
"""

import json
import re
import shutil
from pathlib import Path

import pytest

FILES = {  # where the file goes inside the package: its text
    "layers/linear/added_mixer.py": '''
"""A mixer that counts its tokens and projects each."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

import engrax
from engrax.layers.common.modules import projection


@engrax.register("added_mixer")
@dataclasses.dataclass(frozen=True)
class AddedMixerConfig(engrax.MixerConfig):
    """y_t = x_t W."""

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return AddedMixer(dim, rngs=rngs)

    def flops_per_token(self, dim, seq_len):
        return 2.0 * dim * dim


class AddedMixer(nnx.Module):
    def __init__(self, dim, *, rngs):
        self.write = projection(dim, dim, ("embed", "mlp"), rngs=rngs)

    def init_state(self, batch_size):
        return {"tokens": jnp.zeros(batch_size)}

    def __call__(self, x, state=None, segment_ids=None):
        state = self.init_state(len(x)) if state is None else state
        real = jnp.ones(x.shape[:2]) if segment_ids is None else (segment_ids >= 0).astype(jnp.float32)
        return self.write(x) * real[..., None].astype(x.dtype), {"tokens": state["tokens"] + real.sum(axis=1)}
''',
    "models/added_model.py": '''
"""A pattern language model without an MLP."""

import dataclasses

import engrax
from engrax.models import LanguageModelConfig


@engrax.register("added_model")
@dataclasses.dataclass(frozen=True)
class AddedModelConfig(LanguageModelConfig):
    """The pattern language model, its blocks without an MLP."""

    mlp_hidden: int | None = 0  # hidden width of the MLP
''',
    "data/added_data.py": '''
"""Text that counts."""

import dataclasses
import functools

import engrax
from engrax.data.text import Corpus, CorpusConfig


@engrax.register("added_data")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedData(CorpusConfig):
    """The numbers from 0 up, ten to a document."""

    documents_wanted: int = 40  # documents

    def _corpus(self):
        return count(self.documents_wanted)


@functools.cache
def count(documents):
    texts = (" ".join(str(10 * i + j) for j in range(10)) for i in range(documents))
    return Corpus([(str(i), text.encode()) for i, text in enumerate(texts)])
''',
    "train/optimizers/added_optimizer.py": '''
"""Gradient descent by the sign."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

import engrax


@engrax.register("added_optimizer")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedOptimizerConfig(engrax.OptimizerConfig):
    """The sign of the gradient."""

    scale: float = 0.5  # length of a step, times the learning rate

    def direction(self):
        return optax.stateless(lambda g, _: jax.tree.map(lambda x: self.scale * jnp.sign(x), g))
''',
    "train/schedules/added_schedule.py": '''
"""A rate that falls with the root of the step."""

import dataclasses

import jax.numpy as jnp

import engrax


@engrax.register("added_schedule")
@dataclasses.dataclass(frozen=True, kw_only=True)
class AddedScheduleConfig(engrax.ScheduleConfig):
    """Warmup, then peak / sqrt(1 + steps since)."""

    def after_warmup(self, peak, steps, warmup):
        return lambda step: peak / jnp.sqrt(1.0 + step)
''',
    "evals/evaluators/added_evaluator.py": '''
"""The hardest token."""

import dataclasses

import engrax
from engrax.evals import Evaluation, Figure, plots


@engrax.register("added_evaluator")
@dataclasses.dataclass(frozen=True)
class AddedEvaluatorConfig(engrax.EvaluatorConfig):
    """The largest loss of a token."""

    def run(self, context):
        worst = context.scores().nats.max()
        png = plots.bars(context.title("Hardest"), "nats", [{"name": "worst", "kind": "model", "value": worst}])
        figure = Figure("hardest", "The hardest token", "A caption < of its own.", png)
        return Evaluation({"worst": worst}, [figure], [("hardest token, nats", f"{worst:.4f}")])
''',
}
CONFIG = '''
"""All that was added, in one run."""

from engrax.data import DATASETS
from engrax.layers import MIXERS
from engrax.models import MODELS
from engrax.train import OPTIMIZERS, SCHEDULES, EvalConfig, Experiment, LogConfig


def config():
    schedule = SCHEDULES["added_schedule"](warmup_steps=1)
    return Experiment(
        model=MODELS["added_model"](dim=16, mixers=(MIXERS["added_mixer"](),), repeat=1),
        data=DATASETS["added_data"](seq_len=32),
        steps=3,
        batch_size=4,
        optimizer=OPTIMIZERS["added_optimizer"](learning_rate=0.1, schedule=schedule),
        eval=EvalConfig(every=0, batches=1),
        log=LogConfig(every=1),
    )
'''

COMMANDS = """
import json, sys
import engrax
from engrax import cli
print("engrax:", engrax.__file__)
for command in json.loads(sys.argv[1]):
    assert cli.main(command) == 0, command
"""
RELOAD = """
import json, sys
import engrax
from engrax.train import runs
model, step = engrax.load(sys.argv[1], plugins=json.loads(sys.argv[2]))
print("reloaded", step, runs.open_run(sys.argv[1]).experiment.optimizer)
"""


def copies_of(run, plugins):
    """The run's own copies of the files; an evaluator is no part of a run."""
    return [str(p if p.stem == "added_evaluator" else run / "source" / p.name) for p in plugins]


def check_run(run, run_python, config, plugins):
    """Trains 3 steps, then evaluates, samples and loads the run in a fresh process; returns what was printed."""
    flags = [word for plugin in plugins for word in ("--plugin", str(plugin))]
    out = run_python(COMMANDS, devices=1, args=[json.dumps([["train", config, "--run-dir", str(run), *flags]])])
    saved = json.loads((run / "config.json").read_text())["experiment"]
    assert (saved["optimizer"]["type"], saved["optimizer"]["schedule"]["type"]) == (
        "optimizer:added_optimizer",
        "schedule:added_schedule",
    )
    rates = [json.loads(line)["learning_rate"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [round(rate, 4) for rate in rates] == [0.05, 0.1, 0.0707]

    flags = [word for plugin in copies_of(run, plugins) for word in ("--plugin", plugin)]
    named = ["evaluate", str(run), "--only", "added_evaluator,validation", "--batches", "1", *flags]
    later = [
        ["evaluate", str(run), "--batches", "1", *flags],
        named,
        ["generate", str(run), "--prompt", "1 2", "--tokens", "4", *flags],
    ]
    out += run_python(COMMANDS, devices=1, args=[json.dumps([*later, ["list"]])])
    for folder, more in (("step_3", {"costs", "training"}), ("step_3-2", set())):
        found = json.loads((run / "evals" / folder / "results.json").read_text())["evaluations"]
        assert {"validation", "added_evaluator"} <= set(found)
        assert more <= set(found) and (more or len(found) == 2), "--only runs what it names"
        worst = found["added_evaluator"]["worst"]
        assert f"hardest token, nats  {worst:.4f}" in re.sub(" {2,}", "  ", out)
        assert (run / "evals" / folder / "hardest.png").read_bytes().startswith(b"\x89PNG")
        page = (run / "evals" / folder / "report.html").read_text()
        assert "<h2>The hardest token</h2>" in page and "A caption &lt; of its own." in page
        assert str(run / "evals" / folder) in out
    assert "\n1 2" in out
    return out


def test_a_file_outside_the_package_is_enough(tmp_path, run_python):
    plugins = [tmp_path / Path(place).name for place in FILES]
    for plugin, text in zip(plugins, FILES.values()):
        plugin.write_text(text)
    (tmp_path / "everything.py").write_text(CONFIG)
    check_run(tmp_path / "run", run_python, "everything.py", plugins)
    sources = sorted(path.name for path in (tmp_path / "run" / "source").iterdir())
    names = [path.name for path in plugins if path.stem != "added_evaluator"]
    assert sources == sorted([*names, "everything.py", "manifest.json"])

    copies = copies_of(tmp_path / "run", plugins)
    out = run_python(RELOAD, devices=1, args=[tmp_path / "run", json.dumps(copies)])
    assert "reloaded 3 AddedOptimizerConfig(" in out and "scale=0.5" in out


@pytest.mark.deep
def test_the_same_file_inside_the_package_is_enough(root, tmp_path, run_python):
    package = tmp_path / "engrax"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "runs", "notebooks", "docs", "build", "*.egg-info")
    shutil.copytree(root, package, ignore=left_out)
    for place, text in FILES.items():
        (package / place).write_text(text)
    (package / "configs" / "everything.py").write_text(CONFIG)

    def run_copy(code, **settings):
        return run_python(code, env={"PYTHONPATH": tmp_path}, **settings)

    out = check_run(tmp_path / "run", run_copy, "everything", [])
    assert out.count(f"engrax: {package}") == 2
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert {Path(place).stem for place in FILES} | {"everything"} <= set(listed)
    assert not (tmp_path / "run" / "source").exists()
