"""engrax: memory-augmented sequence architectures in JAX/Flax, tested by the same laws.

    import engrax

    run = engrax.train("quickstart", "runs/quickstart", steps=200)
    engrax.evaluate("runs/quickstart")
    print(engrax.generate("runs/quickstart", "def "))
    session = engrax.session("runs/quickstart").feed("import os")
    model, step = engrax.load("runs/quickstart")

Importing engrax is light: its parts, jax and Flax load when used.
"""

from typing import TYPE_CHECKING

from engrax import lazy
from engrax.errors import UserError
from engrax.registry import register

if TYPE_CHECKING:
    from engrax import configs, data, evals, laws, layers, models, pallas_kernels, train
    from engrax.data.config import DataConfig
    from engrax.evals.evaluator import EvaluatorConfig
    from engrax.layers.mixer import MixerConfig
    from engrax.models.model import ModelConfig
    from engrax.models.sampling import Sampling
    from engrax.train.optimizers.base import OptimizerConfig
    from engrax.train.schedules.base import ScheduleConfig

__version__ = "0.2.0"
__all__ = [
    "DataConfig",
    "EvaluatorConfig",
    "MixerConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Sampling",
    "ScheduleConfig",
    "UserError",
    "check",
    "compare",
    "configs",
    "data",
    "evals",
    "evaluate",
    "export",
    "frontier",
    "generate",
    "laws",
    "layers",
    "load",
    "load_published",
    "models",
    "pallas_kernels",
    "register",
    "reproduce",
    "sample",
    "session",
    "sweep",
    "train",
]

__getattr__ = lazy.attach(__name__)


def _train(config, run_dir, *, source=None, progress=True, **fields):
    """The function behind `engrax.train`; see there."""
    from engrax import configs
    from engrax.train import experiment as experiments
    from engrax.train import loop
    from engrax.train.experiment import Experiment

    if not isinstance(config, Experiment):
        found = configs.find(str(config))
        config, source = found.experiment, found.path
    experiment = experiments.replace(config, {name.replace("__", "."): value for name, value in fields.items()})
    return loop.train(experiment, run_dir, source=source, progress=progress)


def load(run, step=None, plugins=()):
    """(model, step) of a run folder's checkpoint: None = newest, "best" = lowest validation loss, or a step's number.

    `plugins` are the user's files that register mixers or models. Raises UserError if something is missing.
    """
    from engrax.train import runs

    return _open(run, plugins, runs).load(step)


def evaluate(run, *, step=None, only=None, batches=None, stream=None, plugins=(), data=None, progress=True, **tasks):
    """Evaluates a checkpoint of a run folder and writes a new folder in RUN/evals; returns `engrax.evals.Results`.

    `only`: names of evaluators to run; None runs all that apply. `stream`: also read that many tokens of long
    validation documents through the carried memory. `plugins`: files that register the user's own mixers or evaluators.
    `data`: fields of the data set to replace, {"path": "elsewhere/books"} for a run away from its data. `tasks`: run
    generated tasks instead: `tasks=["mqar"], lengths=[64, 256], pairs=[4, 16], examples=500, task={"power_a": 1.0}`.
    """
    from engrax import evals
    from engrax.train import runs

    _open(run, plugins, runs, data)
    settings = dict(step=step, only=only, batches=batches, stream=stream, data=data, progress=progress)
    return evals.evaluate(run, **settings, **tasks)


def compare(what, folder=None, *, seeds=None, processes=1, minutes=None, progress=True):
    """Compares experiments, or finished runs; returns `engrax.evals.ComparisonResult`.

    `what`: a `Comparison`, its name or .py file, whose trials are trained in `folder` (default: runs/NAME); or a list
    of run folders, which are scored as they are, with the table's files in `folder` if it is given. `seeds`: trainings
    at the best rate; 1 = a look, without verdicts. `processes`, `minutes`: as for `engrax.sweep`.
    """
    import dataclasses

    from engrax import configs, evals

    if isinstance(what, (list, tuple)):
        return evals.compare_runs(what, folder)
    name = "comparison"
    if not isinstance(what, evals.Comparison):
        what, name = configs.find_comparison(str(what))
    if seeds is not None:
        what = dataclasses.replace(what, seeds=seeds)
    options = dict(processes=processes, minutes=minutes, progress=progress)
    return evals.compare(what, folder or f"runs/{name}", **options)


def sweep(config, folder, *, grid=None, random=None, trials=None, seeds=1, processes=1, minutes=None, **fields):
    """Trains an experiment at many settings; returns `engrax.evals.search.SweepResult`, continues what is in `folder`.

    `config`: a name, a .py file or an Experiment; `fields` are replaced in it as in `engrax.train`. `grid`: every
    combination of values, {"optimizer.learning_rate": (1e-3, 3e-3)}; `random`: `trials` draws from ranges,
    {"model.dim": (32, 128, True)} = from 32 to 128, uniform in the logarithm. `seeds` trainings each,
    `processes` at the same time; none begins that would end after `minutes`.
    """
    from engrax import configs
    from engrax.evals.search import search
    from engrax.train import experiment as experiments
    from engrax.train.experiment import Experiment

    name = "CONFIG" if isinstance(config, Experiment) else str(config)
    experiment = config if isinstance(config, Experiment) else configs.find(name).experiment
    experiment = experiments.replace(experiment, {field.replace("__", "."): value for field, value in fields.items()})
    options = dict(grid=grid, random=random, trials=trials, seeds=seeds, processes=processes, minutes=minutes)
    return search(experiment, folder, rerun=["engrax", "train", name], **options)


def check(target, *, laws=(), progress=True):
    """The laws that a mixer or model breaks: a list of `engrax.laws.Breach`, empty if all hold.

    `target`: a Python file that registers mixers or models, a registered name, or a config; `laws`: names of laws
    ("causality") or of their parts, none = all. Raises UserError if the target cannot be found, built or called.
    """
    from engrax.laws import check as run

    return run(target, laws=laws, progress=progress)


def frontier(
    task="mqar",
    *,
    mixers=None,
    preset="quick",
    sizes=None,
    minutes=None,
    processes=1,
    folder=None,
    plugins=(),
    progress=True,
    **fields,
):
    """Trains mixers with states of several sizes on a generated task; returns `engrax.evals.FrontierResult`.

    `mixers`: names; None takes the preset's and those of `plugins`, the user's files. `preset`: quick or full. `sizes`:
    bytes of a layer's state. `minutes`: no training begins that would end later; the same call continues. `fields`: of
    all experiments, `data__num_pairs=16`, `steps=500`. docs/frontier.md has the rules.
    """
    import dataclasses

    from engrax.evals.frontier import setting
    from engrax.evals.frontier_report import frontier as run
    from engrax.plugins import load as load_plugin
    from engrax.train import experiment as experiments

    for path in plugins:
        load_plugin(path)
    chosen = setting(task, mixers, preset)
    changed = experiments.replace(chosen.experiment, {name.replace("__", "."): value for name, value in fields.items()})
    chosen = dataclasses.replace(chosen, experiment=changed, sizes=tuple(sizes or chosen.sizes))
    where = folder or f"runs/frontier_{task}_{preset}"
    return run(chosen, where, processes=processes, minutes=minutes, progress=progress)


def reproduce(card, *, preset="quick", folder="runs/claims", docs=None, processes=1, minutes=None, progress=True):
    """Tries the claim of a card; returns `engrax.evals.claim_report.Reproduced`, whose page is printed.

    `card`: a name that `engrax reproduce` lists, or a .py file with `card()`. `preset`: quick (2 minutes of two cores)
    or full. `folder`: where its runs and its page go; the same call continues. `docs`: another folder for the page.
    `processes`, `minutes`: as for `engrax.sweep`.
    """
    from engrax import configs
    from engrax.evals.claim_report import reproduce as run
    from engrax.evals.claims import Options

    found, name, title = configs.find_card(card)
    options = Options(processes, minutes, progress, f"engrax reproduce {card} --preset {preset}")
    return run(found, name, title, folder, preset=preset, options=options, docs=docs)


def sample(folder="runs/sample"):
    """Copies the trained run that comes with engrax (`configs/small_hybrid.py`) into `folder`; returns its path.

    Raises UserError if the folder exists and is not empty.
    """
    import shutil
    from pathlib import Path

    from engrax.train import runs

    target = runs.folder(folder)
    runs.refuse_file(target)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder for the sample run.")
    shutil.copytree(Path(__file__).parent / "configs" / "trained" / "small_hybrid", target, dirs_exist_ok=True)
    return Path(target)


def generate(
    run_or_model,
    prompt,
    *,
    tokens=200,
    sampling=None,
    stream=False,
    tokenizer=None,
    dtype=None,
    step=None,
    plugins=(),
    data=None,
    **settings,
):
    """A sampled continuation of `prompt`, up to `tokens` tokens long; for a list of prompts a list.

    `run_or_model`, `tokenizer`, `dtype`, `step`, `plugins`, `data`: as for `engrax.session`. `prompt`: text or token
    ids; the result is text or ids. `sampling`: a `Sampling`, or its fields by name: `temperature=0` takes the most
    likely token. `stream=True` returns an iterator of the text of one prompt as it is written. With the same seed, a
    row of a list gives the same as alone.
    """
    from engrax.models import sampling as draws
    from engrax.models.tokens import is_one

    chosen = draws.of(sampling, settings)
    rows = 1 if is_one(prompt) else len(prompt)
    options = dict(rows=rows, tokenizer=tokenizer, dtype=dtype, step=step, plugins=plugins, data=data)
    opened = session(run_or_model, **options).feed(prompt)
    if stream:
        return opened.stream_text(tokens, chosen)
    found = opened.generate(tokens, chosen)
    return [found] if rows == 1 and not is_one(prompt) else found


def session(run_or_model, *, rows=1, tokenizer=None, dtype=None, step=None, plugins=(), data=None):
    """A session that holds a model's memory (`engrax.models.session.Session`): feed it a text, ask, branch, save.

    `run_or_model`: a run folder, read at `step` with the run's tokenizer and compute dtype, or a model, with a
    `tokenizer` for texts. `dtype`: another compute dtype. `rows`: texts read together. `plugins`: as for `load`. No
    data are read. `data`: fields of the data set to replace, {"tokenizer_file": "tokenizer.json"} for example.
    """
    from engrax.models.session import Session

    if not isinstance(run_or_model, str) and not hasattr(run_or_model, "__fspath__"):
        return Session(run_or_model, tokenizer=tokenizer, rows=rows, dtype=dtype)
    from engrax.train import runs

    opened = _open(run_or_model, plugins, runs, data)
    return opened.session(step, rows=rows, tokenizer=tokenizer, dtype=dtype)


def export(run, folder, *, to=None, step=None, dtype="float32", plugins=()):
    """Writes a run into `folder` as a published format, and returns what is written in another way or left out.

    `to`: a name of `engrax.models.published.FORMATS`, or "safetensors" for engrax's own names of tensors, which any
    model has. Without it a run that began from a published checkpoint (`init_from`) is written back in the same files,
    names and dtypes. `dtype`: float32, bfloat16 or float16, with `to`. Of a wrapping model (HMT, for example) only the
    backbone is written, except as "safetensors". Raises UserError if the format cannot express the model, and names
    why.
    """
    from engrax.models import imported
    from engrax.train import runs

    imported.check_export(folder)
    opened = _open(run, plugins, runs)
    if to is not None:
        from engrax.evals import published

        return published.publish_run(opened, folder, to, step=step, dtype=dtype)
    source = opened.directory / "pretrained"
    if not source.exists():
        raise UserError(
            f"{run} did not begin from a published checkpoint (--init-from): there is no layout to export to; "
            "name a format with --to (engrax describe says which fit)."
        )
    model, _ = opened.load(step)
    for part in imported.find_backbone(opened.experiment.model)[1]:
        model = getattr(model, part)
    imported.export(model, folder, like=str(source))
    return ()


def load_published(folder, *, dtype=None):
    """The model of a folder in a published format, engrax's own included, with parameters in `dtype` (float32)."""
    from engrax.evals import published

    return published.load(folder, dtype)


def _open(run, plugins, runs, data=None):
    from engrax.plugins import load as load_plugin
    from engrax.train import run_sources

    for path in plugins:
        load_plugin(path)
    opened = runs.open_run(run, data)
    run_sources.warn_of_changes(opened.directory, plugins)
    return opened
