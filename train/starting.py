"""What a run's parameters start from: a published checkpoint (`init_from`) or an earlier run (`start_from`).

If the model there differs in layers, adapters or vocabulary, its parameters are handed over
(`engrax.models.handover`), and the log names the others.
"""

import sys
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from flax import nnx

from engrax import models
from engrax.errors import UserError
from engrax.files import expect, read_json, refuse_links
from engrax.models import handover, imported
from engrax.models.handover import Path
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import ModelConfig
from engrax.train import runs, sharding
from engrax.train.checkpoint import Checkpoints

BEGINS_AT = "start_from.json"  # in a run folder: the starting step in the earlier run


def find(trainer: Any, run_dir: epath.Path) -> tuple[int | None, dict[Path, jax.Array]]:
    """(step of the run `start_from` or None, {path: parameter with the trainer's sharding}); {} without a start.

    Parameters that are not among them are fresh; the log names them.
    """
    experiment = trainer.experiment
    if experiment.init_from is not None and experiment.start_from is not None:
        raise UserError("init_from and start_from both say what the parameters start from; choose one.")
    if experiment.start_from is not None:
        step, found = _earlier_params(trainer, run_dir)
    else:
        step, found = None, _imported_params(trainer)
    if found and jax.process_index() == 0:
        like = {path: leaf for path, leaf in nnx.to_flat_state(trainer.abstract_state()["params"])}
        if new := set(like) - set(found):
            size = sum(like[path].get_value().size for path in new)
            names = ", ".join(handover.told(new, set(like)))
            print(f"new parameters, {size:,} in number: {names}", file=sys.stderr)
    return step, found


def _imported_params(trainer: Any) -> dict[Path, jax.Array]:
    """The parameters in `init_from`."""
    folder = trainer.experiment.init_from
    if folder is None:
        return {}
    config, at = imported.find_backbone(trainer.experiment.model)
    source = handover.plain(config, imported.read_config(folder).vocab_size)
    if not config.layers and source.vocab_size == config.vocab_size:
        return imported.read_params(folder, trainer.abstract_state()["params"], at=at)
    return _handed_over(trainer, source, lambda like: imported.read_params(folder, like))


def _earlier_params(trainer: Any, run_dir: epath.Path) -> tuple[int, dict[Path, jax.Array]]:
    """(step, parameters) of the run `start_from`: the newest, or those this run already started from if it stopped
    before its first checkpoint."""
    given = trainer.experiment.start_from
    directory = runs.folder(given)
    if not (directory / "checkpoints").exists():
        raise UserError(f"start_from={given} holds no checkpoints; give the folder of a run that was trained.")
    started = run_dir / BEGINS_AT
    refuse_links(directory)
    at = expect(read_json(started).get("step"), int, f"{started}: step") if started.exists() else None
    earlier, steps = Checkpoints(directory), []

    def read(like):
        optimizer = runs.read_optimizer(directory)
        found, step = earlier.read(at, lambda step: runs.evaluated_params(earlier, optimizer, like, step))
        steps.append(step)
        return {path: leaf.get_value() for path, leaf in nnx.to_flat_state(found)}

    try:
        source = runs.read_model(directory)
        if source == trainer.experiment.model:
            found = read(trainer.abstract_state()["params"])
        else:
            found = _handed_over(trainer, source, read)
    except UserError as error:
        hint = f" This run started from it ({started}); start again in another --run-dir." if started.exists() else ""
        raise UserError(f"start_from={given}: {error}{hint}") from None
    return steps[0], found


def _handed_over(
    trainer: Any, source: ModelConfig, read: Callable[[nnx.State], dict[Path, jax.Array]]
) -> dict[Path, jax.Array]:
    """The parameters of another model as the trainer's; read(like): those of the model `source`, with the shardings of
    its abstract parameters `like`."""
    like = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(trainer.abstract_state()["params"])}
    model = trainer.experiment.model
    shapes = nnx.state(nnx.eval_shape(lambda: models.build(source, rngs=nnx.Rngs(0))), nnx.Param)
    specs = sharding.named(
        sharding.param_specs(shapes, trainer.experiment.parallel, trainer.mesh, stage=3), trainer.mesh
    )
    placed = jax.tree.map(lambda p, where: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=where), shapes, specs)
    if not _has_backbone(source) or not _has_backbone(model):
        return read(trainer.abstract_state()["params"])  # which raises if they differ
    (old, inside), (new, at) = imported.find_backbone(source), imported.find_backbone(model)
    given = {(*at, *p[len(inside) :]) if p[: len(inside)] == inside else p: value for p, value in read(placed).items()}
    return handover.hand_over(old, new, given, like, at=at)


def _has_backbone(model: ModelConfig) -> bool:
    """Whether it is a language model of blocks, or wraps one."""
    while isinstance(inner := getattr(model, "backbone", None), ModelConfig):
        model = inner
    return isinstance(model, LanguageModelConfig)
