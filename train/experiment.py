"""The definition of an experiment: a frozen tree of dataclasses, saved as JSON with registered names.

Run-time fields (devices, logging, saving, guards) may change when a run is resumed. All other fields define the
experiment: a run folder refuses a config that changes one of them.
"""

import dataclasses
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from engrax.data.config import DataConfig
from engrax.errors import UserError, require_at_least
from engrax.files import parse_object, short
from engrax.models.model import ModelConfig
from engrax.registry import KINDS, did_you_mean, find_registry
from engrax.train.guards import GuardConfig
from engrax.train.optimizers import AdamWConfig, OptimizerConfig

FORMAT_VERSION = 2  # format of config.json; engrax 0.1.0 wrote format 1


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh and what is sharded over it. Run-time: a run may resume on another mesh."""

    strategy: Literal["pjit", "pmap"] = "pjit"  # compiler-placed or explicit collectives; the same numbers
    data: int = -1  # devices along the batch; -1 = all remaining devices
    fsdp: int = 1  # devices along the batch that also shard parameters (zero 3)
    tensor: int = 1  # devices that split heads, hidden widths and vocabulary
    sequence: int = 1  # devices that split the tokens of a row
    zero: Literal[0, 1, 2, 3] = 0  # 1: optimizer state sharded; 2: gradients too; 3: parameters too; 0: nothing
    offload: Literal["none", "optimizer"] = "none"  # optimizer: its state is in the host's memory between steps

    def __post_init__(self):
        require_at_least("parallel", self, fsdp=1, tensor=1, sequence=1)
        if self.data == 0 or self.data < -1:
            raise UserError(f"parallel.data={self.data} must be at least 1, or -1 for all remaining devices.")

    def mesh_shape(self, devices: int) -> tuple[int, int, int, int]:
        """Devices along data, fsdp, tensor and sequence. An open `data` takes what the others leave of `devices`, at
        least 1."""
        others = self.fsdp, self.tensor, self.sequence
        return max(devices // math.prod(others), 1) if self.data == -1 else self.data, *others


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. Run-time."""

    every: int = 200  # steps between checkpoints; 0 = only after the last step
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints kept for the lowest validation loss
    when_full: Literal["go_on", "stop"] = "go_on"  # a full disk: train on and save when there is room, or stop

    def __post_init__(self):
        require_at_least("checkpoint", self, every=0, keep_last=1, keep_best=0)


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Validation during training. Run-time."""

    every: int = 200  # steps between validations, in addition to one at every checkpoint; 0 = only at checkpoints
    batches: int = 8  # validation batches at each

    def __post_init__(self):
        require_at_least("eval", self, every=0, batches=1)


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Where metrics go, in addition to metrics.jsonl and the progress bar. Run-time."""

    every: int = 10  # steps between logged steps
    wandb: Literal["off", "offline", "online"] = "off"  # Weights & Biases
    wandb_project: str = "engrax"  # its project name
    tensorboard: bool = False  # event files in RUN/tensorboard

    def __post_init__(self):
        require_at_least("log", self, every=1)


MOST = 1 << 31  # limit of every number in a config: no array has such an axis, no generator such a seed
# A field of the data with such a name has a path, or several. A run saves it as an absolute path.
PATH = re.compile(r"(^|_)(path|dir|folder|file)s?$")
RUN_TIME_FIELDS = ("parallel", "checkpoint", "eval", "log", "guard")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, its data and its training."""

    model: ModelConfig
    data: DataConfig
    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # rows per step, over all devices and microbatches
    seed: int = 0  # seed of the parameters and of the data order
    align: int = 1  # tokens; packed documents start at multiples of it (for example a memory's chunk_size)
    compute_dtype: Literal["float32", "bfloat16", "auto"] = "auto"  # of activations; auto = bfloat16 on GPU and TPU
    init_from: str | None = None  # folder of a published checkpoint to start from; None = random initialisation
    allow_future: bool = False  # train a model that sees the tokens it should predict
    start_from: str | None = None  # run folder whose newest parameters this run starts from (a second stage)
    carry_memory: bool = False  # a batch starts from the memory after the previous one; rows are streams of documents
    optimizer: OptimizerConfig = AdamWConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self):
        _refuse_senseless(self)
        if self.carry_memory and (self.optimizer.accumulate > 1 or self.parallel.strategy != "pjit"):
            raise UserError("carry_memory needs optimizer.accumulate=1 and parallel.strategy='pjit'.")
        if self.guard.action == "rewind" and not self.checkpoint.every:
            raise UserError("guard.action='rewind' goes back to a checkpoint; set --checkpoint.every to save some.")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.batch_size % self.optimizer.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} does not divide into {self.optimizer.accumulate} microbatches; "
                "change batch_size or optimizer.accumulate."
            )


def _refuse_senseless(experiment: Experiment) -> None:
    """Raises UserError for a non-finite number, an absurdly large number, or a negative seed."""
    for path, value in _numbers(experiment):
        if not -MOST < value < MOST and (isinstance(value, int) or not math.isfinite(value)):
            raise UserError(f"{path}={short(value)} makes no sense; give a finite number below {MOST:,}.")
        if value < 0 and path.split(".")[-1] == "seed":
            raise UserError(f"{path}={value} must not be negative.")


def _numbers(config: Any, path: str = "") -> Iterator[tuple[str, int | float]]:
    """(dotted name, value) of every number in a config."""
    if dataclasses.is_dataclass(config):
        items = [(field.name, getattr(config, field.name)) for field in dataclasses.fields(config)]
    else:
        items = list(enumerate(config)) if isinstance(config, (tuple, list)) else []
    for name, value in items:
        place = f"{path}.{name}" if path else str(name)
        if isinstance(value, (int, float)):
            yield place, value
        else:
            yield from _numbers(value, place)


def nested_configs(config: Any, skip: type | tuple[type, ...] = ()) -> Iterator[Any]:
    """Yields the config and all dataclasses in it, without those of the classes `skip` and their contents."""
    if isinstance(config, (tuple, list)):
        for item in config:
            yield from nested_configs(item, skip)
    elif dataclasses.is_dataclass(config) and not isinstance(config, skip):
        yield config
        for field in dataclasses.fields(config):
            yield from nested_configs(getattr(config, field.name), skip)


def map_fields(config: Any, name: str, change: Callable[[str, Any], Any]) -> Any:
    """The config with `change(field's name, value)` for the values of all fields inside its field `name`."""

    def changed(name, value):
        if dataclasses.is_dataclass(value):
            fields = [field.name for field in dataclasses.fields(value) if field.init]
            old = {field: getattr(value, field) for field in fields}
            new = {field: changed(field, item) for field, item in old.items()}
            return value if new == old else dataclasses.replace(value, **new)
        if isinstance(value, tuple):
            return tuple(changed(name, item) for item in value)
        return change(name, value)

    return dataclasses.replace(config, **{name: changed(name, getattr(config, name))})


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """The experiment with absolute paths for its data, `init_from` and `start_from`; bucket paths do not change."""

    def absolute(value: str) -> str:
        return value if "://" in value or not value else os.path.abspath(os.path.expanduser(value))

    def change(name: str, value: Any) -> Any:
        return absolute(value) if isinstance(value, str) and PATH.search(name) else value

    given = {name: getattr(experiment, name) for name in ("init_from", "start_from")}
    given = {name: path and absolute(path) for name, path in given.items()}
    return dataclasses.replace(map_fields(experiment, "data", change), **given)


def to_dict(config: Any) -> Any:
    """The config as a JSON-able tree; registered configs have {"type": "kind:name"}."""
    if dataclasses.is_dataclass(config):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config) if f.init}
        registry = getattr(type(config), "registry", None)
        if registry is None:
            return fields
        name = type(config).registered_name
        if name not in registry or registry[name] is not type(config):
            raise UserError(
                f"{type(config).__name__} is not registered, or was registered again since; put "
                f'@engrax.register("name") above it, then build the {registry.word} again.'
            )
        return {"type": f"{registry.kind}:{name}"} | fields
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    if isinstance(config, (str, int, float, bool, type(None))):
        return config
    raise UserError(
        f"a config holds {config!r}, which JSON cannot carry; use numbers, strings, tuples and registered configs."
    )


def from_dict(data: Any, annotation: Any = Experiment, path: str = "config") -> Any:
    """The inverse of `to_dict`. Raises UserError naming the field that does not fit."""
    if isinstance(data, dict):
        cls = _class_of(data, annotation, path)
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for name in data:
            if name != "type" and name not in known:
                raise UserError(f"{path}.{name} is no field of {cls.__name__}{did_you_mean(name, known) or '.'}")
        values = {k: from_dict(v, hints[k], f"{path}.{k}") for k, v in data.items() if k != "type"}
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.init
            and f.name not in values
            and f.default is dataclasses.MISSING
            and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise UserError(f"{path} lacks the field {missing[0]}.")
        try:
            return cls(**values)
        except UserError:
            raise
        except Exception as error:  # from a user's class, or an error that no check of ours covers
            raise UserError(f"{path} makes no sense: {cls.__name__} raises {type(error).__name__}: {error}.") from error
    if isinstance(data, list):
        return _tuple(data, _not_none(annotation), path)
    return _checked(data, annotation, path)


def _class_of(data: dict[str, Any], annotation: Any, path: str) -> type:
    """The dataclass of a group of fields: the registered class that it names, else the annotation."""
    cls = _not_none(annotation)
    if "type" in data:
        kind, _, name = str(data["type"]).partition(":")
        if kind not in KINDS:
            raise UserError(f"{path}.type={short(data['type'])} names no registry (known: {', '.join(KINDS)}).")
        cls = find_registry(kind)[name]
        wanted = [a for a in (typing.get_args(annotation) or (annotation,)) if isinstance(a, type)]
        if annotation is not Any and not any(issubclass(cls, a) for a in wanted):
            raise UserError(f"{path}.type={data['type']!r} cannot stand there: it is no {_named(annotation)}.")
    if not dataclasses.is_dataclass(cls):
        raise UserError(f"{path} holds a group of fields where {_named(cls)} is expected.")
    return cls


def _tuple(data: list, annotation: Any, path: str) -> tuple:
    """The tuple of a list's values, each converted by its annotation."""
    args = typing.get_args(annotation)
    if annotation is Any or annotation is tuple:
        args = (Any, ...)
    elif typing.get_origin(annotation) is not tuple or (args[-1:] != (...,) and len(args) != len(data)):
        raise UserError(f"{path}={short(data)} is not of the type wanted: {_named(annotation)}.")
    kinds = [args[0]] * len(data) if args[-1:] == (...,) else args
    return tuple(from_dict(value, kind, f"{path}.{i}") for i, (value, kind) in enumerate(zip(data, kinds)))


def _named(annotation: Any) -> str:
    """The annotation as text for a message."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def check_saveable(experiment: Experiment) -> None:
    """Raises UserError if config.json cannot restore the experiment: an unregistered class, a value that does not match
    its annotation, or an object that JSON cannot represent."""
    for path, cls in _other_classes(experiment, from_dict(to_dict(experiment), Experiment, "experiment")):
        raise UserError(
            f"{path} is a {cls.__name__}, which a saved run could not restore: it is in no registry; "
            "use engrax's own class there."
        )


def _other_classes(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, type]]:
    """(path, class in `old`) of the dataclasses whose class differs in `new`."""
    if dataclasses.is_dataclass(old):
        if type(old) is not type(new):
            yield path, type(old)
            return
        for field in dataclasses.fields(old):
            place = f"{path}.{field.name}" if path else field.name
            yield from _other_classes(getattr(old, field.name), getattr(new, field.name), place)
    elif isinstance(old, (tuple, list)):
        for i, (a, b) in enumerate(zip(old, new)):
            yield from _other_classes(a, b, f"{path}.{i}")


def _not_none(annotation: Any) -> Any:
    """X of `X | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [a for a in typing.get_args(annotation) if a is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation


def _checked(value: Any, annotation: Any, path: str) -> Any:
    """The plain value if it fits the annotation; an int also fits float."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in args:
            try:
                return _checked(value, choice, path)
            except UserError:
                continue
    elif origin is Literal:
        if value in args:
            return value
    elif annotation is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value) if isinstance(value, float) or abs(value) < MOST**2 else math.inf  # Experiment refuses it
    elif isinstance(annotation, type) and type(value) is annotation:
        return value
    raise UserError(f"{path}={short(value)} is not of the type wanted: {_named(annotation)}.")


def to_json(experiment: Experiment) -> str:
    """The text of config.json."""
    return json.dumps({"format_version": FORMAT_VERSION, "experiment": to_dict(experiment)}, indent=2) + "\n"


def from_json(text: str, path: str = "config.json") -> Experiment:
    """The experiment written by `to_json`. Raises UserError if the text is damaged or of another version."""
    remedy = "restore it from a copy, or train into another folder"
    data = parse_object(text, path, remedy)
    if "experiment" not in data:
        raise UserError(f"{path} is damaged (no experiment in it); {remedy}.")
    version = data.get("format_version")
    if version == 1:
        raise UserError(f"{path} is of a run of engrax 0.1.0 (format 1), which this version cannot read; use 0.1.0.")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {short(version)}; this engrax reads version {FORMAT_VERSION}.")
    try:
        found = from_dict(data["experiment"], Experiment, "experiment")
    except RecursionError:
        raise UserError(f"{path} is damaged (its fields are nested without end); {remedy}.") from None
    if not isinstance(found, Experiment):
        raise UserError(f"{path} is damaged (its experiment is {short(data['experiment'])}); {remedy}.")
    return found


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """The dotted names of the fields in which two `to_dict` trees differ."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") == new.get("type"):
        names = [*old, *(name for name in new if name not in old)]
        return [d for n in names for d in differences(old.get(n), new.get(n), f"{path}.{n}" if path else n)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new)) for d in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [path]


def replace(config: Any, fields: dict[str, Any], path: str = "") -> Any:
    """Returns the config with dotted fields replaced, e.g. {"steps": 3, "model.mixers.0.heads": 8}. Raises UserError
    for an unknown field, naming the nearest one."""
    for dotted, value in fields.items():
        head, _, rest = dotted.partition(".")
        here = f"{path}.{head}" if path else head
        if isinstance(config, tuple):
            if not head.isdigit() or int(head) >= len(config):
                raise UserError(f"{here} is no element of {path}; it has {len(config)}.")
            item = replace(config[int(head)], {rest: value}, here) if rest else value
            config = (*config[: int(head)], item, *config[int(head) + 1 :])
            continue
        known = [f.name for f in dataclasses.fields(config) if f.init] if dataclasses.is_dataclass(config) else []
        if head not in known:
            raise UserError(f"{here} is no field{did_you_mean(head, known) or '.'}")
        if rest:
            value = replace(getattr(config, head), {rest: value}, here)
        elif not dataclasses.is_dataclass(value) and not isinstance(value, (tuple, list)):
            value = _checked(value, typing.get_type_hints(type(config))[head], here)
        config = dataclasses.replace(config, **{head: value})
    return config
