"""The run folder: all that is needed to evaluate, sample or resume a run.

It holds config.json (the experiment, with a format version), environment.json (versions, device, commit, data digest),
metrics.jsonl, checkpoints/, evals/ and source/ (the user's config and plugin files). A second stage also has
start_from.json (the step of the first stage that it started from).
"""

import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from typing import Any

import jax
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from engrax import models
from engrax.errors import UnknownName, UserError
from engrax.models import imported
from engrax.train import experiment as experiments
from engrax.train import sharding
from engrax.train.checkpoint import Checkpoints
from engrax.train.experiment import Experiment


def folder(path: epath.PathLike) -> epath.Path:
    """The absolute path of a run folder; a bucket path (gs://...) is returned unchanged."""
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

        The parameters are on the default device, or with a `mesh` on its devices, sharded by the run's ZeRO stage.
        """
        checkpoints = Checkpoints(self.directory)
        try:
            number = checkpoints.resolve(step)
            model = nnx.eval_shape(lambda: models.build(self.experiment.model, rngs=nnx.Rngs(self.experiment.seed)))
            params = nnx.state(model, nnx.Param)
            like = jax.tree.map(
                lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where),
                params,
                self._shardings(params, mesh),
            )
            nnx.update(model, checkpoints.restore_params(like, number))
        finally:
            checkpoints.close()
        return model, number

    def _shardings(self, params: Any, mesh: Mesh | None) -> Any:
        """The sharding of each parameter."""
        if mesh is None:
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(lambda p: device, params)
        return sharding.named(sharding.param_specs(params, self.experiment.parallel, mesh, stage=3), mesh)


def open_run(run_dir: epath.PathLike) -> Run:
    """Reads a run folder. Raises UserError if it is missing or damaged."""
    directory = folder(run_dir)
    path = directory / "config.json"
    if not directory.exists():
        raise UserError(f"no run folder at {run_dir}; train one with `engrax train CONFIG --run-dir {run_dir}`.")
    if not path.exists():
        raise UserError(
            f"{run_dir} holds no config.json, so it is no run folder; give the folder that `engrax train` wrote."
        )
    environment = directory / "environment.json"
    try:
        found = json.loads(environment.read_text()) if environment.exists() else {}
    except json.JSONDecodeError:
        found = {}  # informative only; the run does not need it
    try:
        experiment = experiments.from_json(path.read_text(), str(path))
    except UnknownName as error:
        sources = sorted((directory / "source").glob("*.py")) if (directory / "source").exists() else []
        if not sources:
            raise
        hint = " ".join(f"--plugin {source}" for source in sources)
        raise UserError(
            f"{str(error).rstrip('.')}; the run brought its own source: read it, then pass {hint}."
        ) from None
    return Run(directory, experiment, found)


def prepare(
    run_dir: epath.PathLike,
    experiment: Experiment,
    steps_done: int = 0,
    source: epath.PathLike | None = None,
    before_writing: Callable[[], None] = lambda: None,
) -> Run:
    """Creates the run folder, or checks that an existing one belongs to this experiment.

    `before_writing` is called when the folder is known to be this experiment's, and may refuse the training.
    Raises UserError naming the fields that differ, or if the data has changed since the run began.
    """
    directory = folder(run_dir)
    environment = describe_environment(experiment)
    if (directory / "config.json").exists():
        old = open_run(directory)
        refuse_differences(old.experiment, experiment, steps_done, directory)
        digest = old.environment.get("data_digest")
        if digest and digest != environment["data_digest"]:
            raise UserError(
                f"the data of {run_dir} has changed since it was started; restore it, or train into another folder."
            )
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"{run_dir} is not empty and holds no run; choose another --run-dir.")
    if experiment.init_from is not None and not (directory / "pretrained").exists():
        imported.check(experiment.init_from, imported.find_backbone(experiment.model)[0])
    before_writing()
    if jax.process_count() > 1:  # barrier: every process validates before any writes
        multihost_utils.sync_global_devices("engrax: the run folder was read")
    if jax.process_index() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(directory / "config.json", experiments.to_json(experiment))
        if experiment.init_from is not None and not (directory / "pretrained").exists():
            imported.describe_source(experiment.init_from, directory / "pretrained")
        if experiment.start_from is not None and not (directory / "pretrained").exists():
            _copy_description(folder(experiment.start_from) / "pretrained", directory / "pretrained")
        if not (directory / "environment.json").exists():  # describes the start of the run, not its last resumption
            write_atomically(directory / "environment.json", json.dumps(environment, indent=2) + "\n")
        _copy_sources(directory, experiment, source)
    return Run(directory, experiment, environment)


def refuse_differences(old: Experiment, new: Experiment, steps_done: int, directory: Any) -> None:
    """Raises UserError if two experiments differ in more than run-time fields."""
    names = experiments.differences(experiments.to_dict(old), experiments.to_dict(new))
    names = [n for n in names if n.split(".")[0] not in experiments.RUN_TIME_FIELDS]
    if "steps" in names and new.optimizer.schedule.steps_may_change(old.steps, new.steps, steps_done):
        names.remove("steps")
    if names:
        schedule = new.optimizer.schedule.registered_name
        hint = f" (the learning rates of the {schedule} schedule depend on it)" if "steps" in names else ""
        raise UserError(
            f"{directory} holds another experiment: it differs in {', '.join(names)}{hint}; choose another --run-dir."
        )


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
        "commit": _commit(),
        "data_digest": experiment.data.digest(),
    }


def _copy_sources(directory: epath.Path, experiment: Experiment, source: epath.PathLike | None) -> None:
    """Copies the user's config file and the files of all user-defined configs into RUN/source."""
    files = {epath.Path(source)} if source else set()
    for config in nested_configs(experiment):
        module = sys.modules.get(type(config).__module__)
        if not type(config).__module__.startswith("engrax.") and getattr(module, "__file__", None):
            files.add(epath.Path(module.__file__))
    for path in files:
        (directory / "source").mkdir(exist_ok=True)
        write_atomically(directory / "source" / path.name, path.read_text())


def _copy_description(source: epath.Path, target: epath.Path) -> None:
    """Copies what `export` needs of the published checkpoint that an earlier stage started from, if there was one."""
    if source.exists():
        target.mkdir()
        for file in source.iterdir():
            (target / file.name).write_bytes(file.read_bytes())


def nested_configs(config: Any, skip: type | tuple[type, ...] = ()) -> Iterator[Any]:
    """Yields the config and all dataclasses in it; those of the classes `skip` are omitted with all they contain."""
    if isinstance(config, (tuple, list)):
        for item in config:
            yield from nested_configs(item, skip)
    elif dataclasses.is_dataclass(config) and not isinstance(config, skip):
        yield config
        for field in dataclasses.fields(config):
            yield from nested_configs(getattr(config, field.name), skip)


def write_atomically(path: epath.Path, text: str) -> None:
    """Writes a temporary file, then renames it: after a crash there is the old file or the new one."""
    temporary = path.parent / (path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
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
