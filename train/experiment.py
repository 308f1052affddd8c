"""The definition of an experiment: a frozen tree of dataclasses, saved as JSON with registered names.

Run-time fields (devices, logging, saving) may change when a run is resumed. All other fields define the experiment: a
run folder refuses a config that changes one of them.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

from engrax.data.config import DataConfig
from engrax.errors import UserError, require_at_least
from engrax.models.model import ModelConfig
from engrax.registry import KINDS, did_you_mean, find_registry
from engrax.train.optimizers import AdamWConfig, OptimizerConfig

FORMAT_VERSION = 2  # of config.json; 1 was written by engrax 0.1.0


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """The device mesh and what is sharded over it. Run-time: a run may resume on another mesh."""

    strategy: Literal["pjit", "pmap"] = "pjit"  # compiler-placed or explicit collectives; the same numbers
    data: int = -1  # devices along the batch; -1 = all remaining devices
    fsdp: int = 1  # devices along the batch that also shard parameters (zero 3)
    tensor: int = 1  # reserved
    sequence: int = 1  # reserved
    zero: Literal[0, 1, 3] = 0  # 0: all replicated; 1: optimizer state sharded; 3: parameters too

    def __post_init__(self):
        if self.tensor != 1 or self.sequence != 1:
            raise UserError("parallel.tensor and parallel.sequence are reserved names; this version runs them at 1.")
        if self.fsdp < 1 or self.data == 0 or self.data < -1:
            raise UserError(
                f"parallel.data={self.data} and parallel.fsdp={self.fsdp} must be at least 1 (data: or -1)."
            )


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. Run-time."""

    every: int = 200  # steps between checkpoints; 0 = only after the last step
    keep_last: int = 2  # newest checkpoints kept
    keep_best: int = 1  # checkpoints kept for the lowest validation loss

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


RUN_TIME_FIELDS = ("parallel", "checkpoint", "eval", "log")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A model, its data and its training."""

    model: ModelConfig
    data: DataConfig
    steps: int = 1000  # optimizer steps
    batch_size: int = 16  # rows per step, over all devices and microbatches
    seed: int = 0  # of the parameters and of the order of the data
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

    def __post_init__(self):
        if self.carry_memory and (self.optimizer.accumulate > 1 or self.parallel.strategy != "pjit"):
            raise UserError("carry_memory needs optimizer.accumulate=1 and parallel.strategy='pjit'.")
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.batch_size % self.optimizer.accumulate:
            raise UserError(
                f"batch_size={self.batch_size} does not divide into {self.optimizer.accumulate} microbatches; "
                "change batch_size or optimizer.accumulate."
            )


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
        cls = annotation
        if "type" in data:
            kind, _, name = str(data["type"]).partition(":")
            if kind not in KINDS:
                raise UserError(f"{path}.type={data['type']!r} names no registry (known: {', '.join(KINDS)}).")
            cls = find_registry(kind)[name]
        if not dataclasses.is_dataclass(cls):
            raise UserError(f"{path} holds a group of fields where {cls} is expected.")
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        for name in data:
            if name != "type" and name not in known:
                raise UserError(f"{path}.{name} is no field of {cls.__name__}{did_you_mean(name, known)}.")
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
        return cls(**values)
    if isinstance(data, list):
        item = (typing.get_args(_not_none(annotation)) or (Any,))[0]
        return tuple(from_dict(value, item, f"{path}.{i}") for i, value in enumerate(data))
    return _checked(data, annotation, path)


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
        return float(value)
    elif isinstance(annotation, type) and type(value) is annotation:
        return value
    name = getattr(annotation, "__name__", None) if origin is None else None
    raise UserError(f"{path}={value!r} is not of the type wanted: {name or annotation}.")


def to_json(experiment: Experiment) -> str:
    """The text of config.json."""
    return json.dumps({"format_version": FORMAT_VERSION, "experiment": to_dict(experiment)}, indent=2) + "\n"


def from_json(text: str, path: str = "config.json") -> Experiment:
    """The experiment written by `to_json`. Raises UserError if the text is damaged or of another version."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is damaged (not JSON: {error}); restore it from a copy, or train into another folder."
        ) from None
    if not isinstance(data, dict) or "experiment" not in data:
        raise UserError(
            f"{path} is damaged (no experiment in it); restore it from a copy, or train into another folder."
        )
    version = data.get("format_version")
    if version == 1:
        raise UserError(f"{path} is of a run of engrax 0.1.0 (format 1), which this version cannot read; use 0.1.0.")
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}; this engrax reads version {FORMAT_VERSION}.")
    return from_dict(data["experiment"], Experiment, "experiment")


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
            raise UserError(f"{here} is no field{did_you_mean(head, known)}.")
        if rest:
            value = replace(getattr(config, head), {rest: value}, here)
        elif not dataclasses.is_dataclass(value) and not isinstance(value, (tuple, list)):
            value = _checked(value, typing.get_type_hints(type(config))[head], here)
        config = dataclasses.replace(config, **{head: value})
    return config
