"""A run with its adapters added to their kernels, as a run folder of its own."""

import dataclasses
import shutil
from typing import Any

import jax
from etils import epath
from flax import nnx

from engrax import models
from engrax.errors import UserError
from engrax.files import write_atomically
from engrax.layers.common import lora
from engrax.layers.common.lora import LoraConfig
from engrax.models import imported
from engrax.models.model import ModelConfig
from engrax.train import experiment as experiments
from engrax.train import runs
from engrax.train.checkpoint import Checkpoints
from engrax.train.experiment import CheckpointConfig
from engrax.train.optimizers import AdamWConfig

COPIED = ("environment.json", "metrics.jsonl", "pretrained", "source")  # of the run's own files


def merge(run: runs.Run, target: epath.PathLike, step: int | str | None = None) -> int:
    """Writes the run folder `target`: the run's model without adapters, each added to its kernel, at the checkpoint's
    step, which is returned. It holds no optimizer state: it can be evaluated, exported and started from, not resumed.

    Raises UserError if the run has no adapters, or if `target` is not empty.
    """
    directory = runs.folder(target)
    runs.refuse_file(directory)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{target} is not empty; choose another folder for the merged run.")
    if not imported.find_backbone(run.experiment.model)[0].lora.rank:
        raise UserError(f"{run.directory} has no adapters (model.lora.rank is 0): there is nothing to merge.")
    model, number = run.load(step)
    config = _without_adapters(run.experiment.model)
    values = lora.merged_params(model)
    fresh = nnx.state(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))), nnx.Param)
    merged = nnx.from_flat_state((path, leaf.replace(values[path])) for path, leaf in nnx.to_flat_state(fresh))
    changes: dict[str, Any] = {"model": config}
    if run.experiment.optimizer.averages:  # its checkpoints hold averages apart from the parameters
        changes["optimizer"] = AdamWConfig()
    directory.mkdir(parents=True, exist_ok=True)
    for path in (run.directory / name for name in COPIED):
        if path.is_dir():
            shutil.copytree(path, directory / path.name)
        elif path.exists():
            (directory / path.name).write_bytes(path.read_bytes())
    checkpoints = Checkpoints(directory, CheckpointConfig())
    try:
        checkpoints.save(number, {"params": jax.block_until_ready(merged)}, {}, None)
        checkpoints.wait()
    finally:
        checkpoints.close()
    experiment = dataclasses.replace(run.experiment, **changes)
    write_atomically(directory / "config.json", experiments.to_json(experiment))
    return number


def _without_adapters(config: ModelConfig) -> ModelConfig:
    if isinstance(inner := getattr(config, "backbone", None), ModelConfig):
        return dataclasses.replace(config, backbone=_without_adapters(inner))
    return dataclasses.replace(config, lora=LoraConfig())
