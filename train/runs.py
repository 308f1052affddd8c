"""The run folder: everything needed to evaluate, sample or resume a run.

It holds config.json (the experiment, with a format version), environment.json (versions, device, commit, data digest),
metrics.jsonl, checkpoints/, evals/ and source/ (the user's files and the tokenizers, with their digests). A second
stage also has start_from.json (the step of the first stage that it started from), a launched one logs/. During training
there is also lock.json, after a hang hung_0.txt (where process 0 stood). Nothing in the folder is executed, and no name
or link in it may lead outside.
"""

import dataclasses
import json
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from engrax import models
from engrax.errors import UnknownName, UserError
from engrax.files import expect, read_json, read_text, refuse_links, write_atomically
from engrax.models import imported
from engrax.models.model import ModelConfig
from engrax.models.session import Session
from engrax.train import agreement, run_lock, run_sources, sharding, train_step
from engrax.train import experiment as experiments
from engrax.train.checkpoint import Checkpoints
from engrax.train.experiment import Experiment, ParallelConfig
from engrax.train.host import keep_compiled_programs
from engrax.train.optimizers import base as optimizers
from engrax.train.optimizers.base import OptimizerConfig
from engrax.train.schedules.base import first_difference

LOGS = "logs"  # in a run folder: what `engrax launch` keeps of the processes' output


def folder(path: epath.PathLike) -> epath.Path:
    """The absolute path of a run folder; a bucket path (gs://...) is returned unchanged. Raises UserError for ""."""
    if not str(path).strip():
        raise UserError("the name of the run folder is empty; give a path.")
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.resolve()


@dataclasses.dataclass(frozen=True)
class Run:
    """An opened run folder."""

    directory: epath.Path
    experiment: Experiment
    environment: dict[str, Any]

    def load(self, step: int | str | None = None, *, mesh: Mesh | None = None) -> tuple[nnx.Module, int]:
        """(the model with a checkpoint's parameters, its step); step None = newest, "best" = lowest validation loss.

        Damaged checkpoints are skipped and named on stderr; one with a given step raises UserError.
        The parameters are on the default device, or with a `mesh` on its devices, sharded by the run's ZeRO stage.
        """
        keep_compiled_programs()
        checkpoints = Checkpoints(self.directory)
        checkpoints.resolve(step)  # raises before anything is built
        model = nnx.eval_shape(lambda: models.build(self.experiment.model, rngs=nnx.Rngs(self.experiment.seed)))
        params = nnx.state(model, nnx.Param)
        like = jax.tree.map(
            lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where),
            params,
            self._shardings(params, mesh),
        )
        optimizer = self.experiment.optimizer
        found, number = checkpoints.read(step, lambda step: evaluated_params(checkpoints, optimizer, like, step))
        nnx.update(model, found)
        return model, number

    def session(
        self, step: int | str | None = None, *, rows: int = 1, tokenizer: Any = None, dtype: Any = None
    ) -> Session:
        """A session of a checkpoint's model, by default with the run's tokenizer and compute dtype."""
        model, number = self.load(step)
        return Session(
            model,
            tokenizer=self.experiment.data.tokenizer if tokenizer is None else tokenizer,
            rows=rows,
            dtype=train_step.resolve_dtype(self.experiment.compute_dtype if dtype is None else dtype),
            name=f"step {number}",
        )

    def _shardings(self, params: Any, mesh: Mesh | None) -> Any:
        """The sharding of each parameter."""
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda p: device, params)
        return sharding.named(sharding.param_specs(params, self.experiment.parallel, mesh, stage=3), mesh)


def evaluated_params(checkpoints: Checkpoints, optimizer: OptimizerConfig, like: Any, step: int) -> Any:
    """The parameters to evaluate of a checkpoint of a run with this optimizer (`OptimizerConfig.evaluated`).

    like: ShapeDtypeStructs with shardings; optimizer state that is needed beside them is sharded by the same rule.
    """
    if not optimizer.averages:
        return checkpoints.restore_params(like, step)
    where = jax.tree.map(lambda p: p.sharding, like)
    opt_state = jax.eval_shape(optimizers.build(optimizer, 1, like).init, like)
    one = jax.tree.leaves(where)[0]
    if isinstance(one, NamedSharding):
        split = ParallelConfig(zero=3 if any(s.spec for s in jax.tree.leaves(where)) else 0)
        places = sharding.named(sharding.param_specs(opt_state, split, one.mesh, stage=3), one.mesh)
    else:
        places = jax.tree.map(lambda _: one, opt_state)
    opt_state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), opt_state, places)
    found = checkpoints.restore_parts({"params": like, "opt_state": opt_state}, step)
    return jax.jit(optimizer.evaluated, out_shardings=where)(found["params"], found["opt_state"])


def read_optimizer(run_dir: epath.Path) -> OptimizerConfig:
    """The optimizer in a run folder's config.json, read without the rest, which may name parts that are not loaded."""
    return _read_part(run_dir, "optimizer", OptimizerConfig)


def read_model(run_dir: epath.Path) -> ModelConfig:
    """The model in a run folder's config.json, read in the same way."""
    return _read_part(run_dir, "model", ModelConfig)


def _read_part(run_dir: epath.Path, name: str, kind: type) -> Any:
    path = run_dir / "config.json"
    data = expect(read_json(path).get("experiment"), dict, f"{path}: experiment")
    return experiments.from_dict(data.get(name), kind, f"{path}: experiment.{name}")


def open_run(run_dir: epath.PathLike, data: dict[str, Any] | None = None) -> Run:
    """Reads a run folder. `data` replaces fields of the data set, {"path": "elsewhere/books"} for example.

    The run's copy replaces a missing tokenizer file. Raises UserError if the folder is missing or damaged, or if the
    tokenizer is not the one used in training.
    """
    experiment = read_experiment(run_dir)
    experiment = experiments.replace(experiment, {f"data.{name}": value for name, value in (data or {}).items()})
    directory = folder(run_dir)
    environment = directory / "environment.json"
    found = read_json(environment) if environment.exists() else {}  # informative: a run works without it
    if found.get("data_digest") is not None:
        expect(found["data_digest"], str, f"{environment}: data_digest")
    return Run(directory, run_sources.with_own_tokenizers(directory, experiment), found)


def read_experiment(run_dir: epath.PathLike) -> Experiment:
    """The experiment in a run folder's config.json. Raises UserError if the folder is missing or damaged."""
    directory = folder(run_dir)
    path = directory / "config.json"
    if not directory.exists():
        raise UserError(f"no run folder at {run_dir}; train one with `engrax train CONFIG --run-dir {run_dir}`.")
    if not directory.is_dir():
        raise UserError(f"{run_dir} is a file; give the folder that `engrax train` wrote.")
    if not path.exists():
        raise UserError(
            f"{run_dir} holds no config.json, so it is no run folder; give the folder that `engrax train` wrote."
        )
    refuse_links(directory)
    try:
        return experiments.from_json(read_text(path), str(path))
    except UnknownName as error:
        if not (hint := run_sources.plugin_hint(directory)):
            raise
        raise UserError(
            f"{str(error).rstrip('.')}; the run brought its own source: read it, then pass {hint}."
        ) from None


def prepare(
    run_dir: epath.PathLike,
    experiment: Experiment,
    steps_done: int = 0,
    source: epath.PathLike | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> Run:
    """Creates the run folder, or checks that an existing one belongs to this experiment.

    `before_writing` is called once the folder is known to belong to this experiment; it may refuse the training. Raises
    UserError naming the fields that differ, or if the data or the tokenizer has changed since the run began. If an
    error stops the writing of a new run, nothing is left.
    """
    directory = folder(run_dir)
    experiment = experiments.with_absolute_paths(experiment)
    environment = _check_folder(directory, experiment, steps_done)
    agreement.check(
        {**environment["versions"], **{name: environment[name] for name in ("python", "commit", "data_digest")}}
    )
    if experiment.init_from is not None and not (directory / "pretrained").exists():
        imported.check(experiment.init_from, imported.find_backbone(experiment.model)[0])
    before_writing()
    if jax.process_count() > 1:  # barrier: every process validates before any writes
        multihost_utils.sync_global_devices("engrax: the run folder was read")
    if jax.process_index() == 0:
        fresh = not (directory / "config.json").exists()
        try:
            _write(directory, experiment, environment, source)
        except BaseException:
            if fresh:
                _remove(directory)
            raise
    return Run(directory, experiment, environment)


def _check_folder(directory: epath.Path, experiment: Experiment, steps_done: int) -> dict[str, Any]:
    """The environment of this process. Raises UserError if the folder belongs to another experiment or is not a run."""
    refuse_file(directory)
    if (directory / "config.json").exists():
        old = open_run(directory)
        run_sources.with_own_tokenizers(directory, experiment)  # raises if the tokenizer differs
        environment = describe_environment(experiment)
        digest = old.environment.get("data_digest")
        same_data = digest == environment["data_digest"]
        refuse_differences(old.experiment, experiment, steps_done, directory, moved=same_data)
        if digest and not same_data:
            raise UserError(
                f"the data of {directory} has changed since it was started; restore it, or train into another folder."
            )
        return environment
    if directory.exists() and any(entry.name not in (run_lock.NAME, LOGS) for entry in directory.iterdir()):
        raise UserError(f"{directory} is not empty and holds no run; choose another --run-dir.")
    return describe_environment(experiment)


def refuse_file(directory: epath.Path) -> None:
    """Raises UserError if the run folder or one of its parents is a file."""
    for path in (directory, *directory.parents):
        if path.exists():
            if not path.is_dir():
                raise UserError(f"{path} is a file, not a folder; choose another --run-dir.")
            return


PARTS = ("config.json", "environment.json", "pretrained", "source")  # what `prepare` writes


def _write(directory: epath.Path, experiment: Experiment, environment: dict[str, Any], source: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "config.json", experiments.to_json(experiment))
    if experiment.init_from is not None and not (directory / "pretrained").exists():
        imported.describe_source(experiment.init_from, directory / "pretrained")
    if experiment.start_from is not None and not (directory / "pretrained").exists():
        _copy_description(folder(experiment.start_from) / "pretrained", directory / "pretrained")
    if not (directory / "environment.json").exists():  # describes the start of the run, not its last resume
        write_atomically(directory / "environment.json", json.dumps(environment, indent=2) + "\n")
    run_sources.copy(directory, experiment, source)


def _remove(directory: epath.Path) -> None:
    """Removes what `_write` wrote, and the folder if nothing else is in it."""
    for path in (directory / name for name in PARTS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()


def refuse_differences(
    old: Experiment, new: Experiment, steps_done: int, directory: Any, *, moved: bool = False
) -> None:
    """Raises UserError if two experiments differ in more than run-time fields. `moved`: paths of the data may differ,
    because the digests are known to be equal."""
    old, new = (experiments.with_absolute_paths(e) for e in (old, new))
    names = experiments.differences(experiments.to_dict(old), experiments.to_dict(new))
    names = [n for n in names if n.split(".")[0] not in experiments.RUN_TIME_FIELDS]
    if moved:
        names = [n for n in names if not (n.startswith("data.") and experiments.PATH.search(n.split(".")[-1]))]
    names, hint = _without_rates(old, new, names, steps_done)
    if names:
        raise UserError(
            f"{directory} holds another experiment: it differs in {', '.join(names)}{hint}; choose another --run-dir."
        )


def _without_rates(old: Experiment, new: Experiment, names: list[str], steps_done: int) -> tuple[list[str], str]:
    """(the names without the steps and the schedule, if the steps done had the learning rates of `new`; else why not).

    So a run may be extended, decayed or annealed as long as its past stays the same.
    """
    rates = [n for n in names if n == "steps" or n.startswith("optimizer.schedule")]
    if not rates:
        return names, ""
    changed = first_difference(*(e.optimizer.rate(e.steps) for e in (old, new)), steps_done)
    if changed is None:
        return [n for n in names if n not in rates], ""
    step, before, after = changed
    schedule = f"the {old.optimizer.schedule.registered_name} schedule"
    return names, f" ({schedule} gave step {step + 1} the learning rate {before:.6g}, now it would be {after:.6g})"


def describe_environment(experiment: Experiment) -> dict[str, Any]:
    """Versions, device, commit and the digest of the data."""
    device = jax.devices()[0]
    return {
        "versions": {
            name: _version(name) for name in ("engrax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
        },
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device.platform}: {device.device_kind}",
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "commit": commit(),
        "data_digest": experiment.data.digest(),
    }


def _copy_description(source: epath.Path, target: epath.Path) -> None:
    """Copies the files that `export` needs from an earlier stage's published checkpoint, if there is one."""
    if source.exists():
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the engrax checkout, with "+" if files differ from it; None outside a checkout."""
    here = epath.Path(__file__).parent.parent

    def git(*args):
        return subprocess.run(["git", "-C", str(here), *args], capture_output=True, text=True, timeout=10)

    try:
        head = git("rev-parse", "HEAD")
        if head.returncode:
            return None
        return head.stdout.strip() + (
            "+" if git("status", "--porcelain", "--untracked-files=no").stdout.strip() else ""
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
