"""`engrax check`: the laws on a user's mixers and models, or on registered ones."""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from engrax import plugins
from engrax.errors import UserError
from engrax.laws.breach import LAWS, Breach, parts_of
from engrax.laws.exemptions import check_exemptions_exist, claims, exempt
from engrax.laws.subject import Subject, is_float, raise_capacity
from engrax.layers import MIXERS
from engrax.models import MODELS, ModelConfig
from engrax.registry import did_you_mean

DIMS = (16, 32, 64, 128, 256)  # model widths for a mixer: the first that it accepts
CAPACITY = 1024  # least tokens of declared caches: enough for the rows of most laws and the later calls
CHUNK = 32  # tokens, for a config without a field chunk_size: its rows have 103 tokens
# A law that cannot be judged while another is broken, because it would show the other law's fault.
HIDDEN_BY = {
    "state_carry": ("state", "independence", "causality"),
    "packing": ("state", "independence", "causality"),
    "padding": ("state", "independence", "causality"),
    "trainability.finite_differences": ("independence", "causality", "packing"),
    "stability.long": ("state",),
}


class Target(NamedTuple):
    """One config to check."""

    label: str  # its registered name, with the example's number if there are several
    config: Any
    path: Path | None  # the user's file that registers it


def check(target: str | Path | Any, *, laws: Sequence[str] = (), progress: bool = True) -> list[Breach]:
    """The laws that `target` breaks, one `Breach` for each law of each config; an empty list if all hold.

    Args:
      target: a Python file, all of whose mixers and models are checked; a registered name; or a config.
      laws: names of laws ("causality") or of their parts ("causality.jacobian"); none = all.
      progress: print a line to stderr for every law tried.

    Runs on the CPU. Raises UserError for an unknown file, name or law, or if a module cannot be built or called.
    """
    parts = _selected(laws)
    breaches = []
    with _on_cpu():
        for found in _targets(target):
            breaches += _check_one(found, parts, progress)
    return breaches


def _selected(laws: Sequence[str]) -> list[str]:
    families = list(dict.fromkeys(part.split(".")[0] for part in LAWS))
    for name in laws:
        if not parts_of(name):
            raise UserError(f"unknown law {name!r}{did_you_mean(name, [*families, *LAWS])} (known: {', '.join(LAWS)}).")
    return [part for part in LAWS if not laws or any(part in parts_of(name) for name in laws)]


@contextlib.contextmanager
def _on_cpu() -> Iterator[None]:
    """The CPU, where equal programs give equal bits; the default device if jax has no CPU backend."""
    try:
        device = jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        device = None
    with jax.default_device(device):
        yield


def _targets(target: Any) -> list[Target]:
    """Every example of every config that the target names."""
    path = None
    if isinstance(target, (str, Path)) and str(target).endswith(".py"):
        path = Path(target)
        classes = _registered_by(path)
    elif isinstance(target, (str, Path)):
        name = str(target)
        classes = [(registry.kind, registry[name]) for registry in (MIXERS, MODELS) if name in registry]
        if not classes:
            known = sorted({*MIXERS, *MODELS})
            raise UserError(
                f"unknown mixer or model {name!r}{did_you_mean(name, known)} (known: {', '.join(known)}; or give a .py "
                "file that registers one)."
            )
    elif isinstance(target, type):
        classes = [("", target)]
    else:
        return [Target(type(target).registered_name or type(target).__name__, target, None)]
    found, names = [], [cls.registered_name for _, cls in classes]
    for kind, cls in classes:
        make = getattr(cls, "examples", lambda cls=cls: (cls(),))
        examples = plugins.run(path, make) if path else make()
        for i, config in enumerate(examples):
            label = cls.registered_name or cls.__name__
            label = f"{kind} {label}" if names.count(label) > 1 else label
            found.append(Target(f"{label}, example {i + 1}" if len(examples) > 1 else label, config, path))
    return found


def _registered_by(path: Path) -> list[tuple[str, type]]:
    """(kind, class) of the mixers and models that a file registers, itself or through its imports."""
    before = {registry.kind: dict(registry.items()) for registry in (MIXERS, MODELS)}
    module = plugins.load(path)
    named = [value for value in vars(module).values() if isinstance(value, type)]
    found = []
    for registry in (MIXERS, MODELS):
        for name, cls in registry.items():
            mine = cls in named and not cls.__module__.startswith("engrax.")
            if mine or before[registry.kind].get(name) is not cls:
                found.append((registry.kind, cls))
    if not found:
        raise UserError(
            f'{path} registers no mixer or model; decorate the class of its settings with @engrax.register("name").'
        )
    return found


def _check_one(target: Target, parts: list[str], progress: bool) -> list[Breach]:
    """The breaches of one config, at most one for each law."""
    dim, wide = _how_it_runs(target)
    broken: dict[str, Breach] = {}
    say = _Progress(target.label, len(parts), progress)
    try:
        check_exemptions_exist(target.config)
        claimed = claims(target.config)
    except Breach as breach:
        breach.law, claimed = "exemptions", {}
        broken["exemptions"] = breach
    with jax.enable_x64(wide):
        try:
            config = raise_capacity(target.config, CAPACITY)
            s = Subject(config, dim=dim, default_chunk=CHUNK, wide=wide)
        except Breach as breach:
            broken["stability"], parts = breach, []
        except Exception as error:
            broken["state"], parts = _raised(error, "state.shapes"), []
        failed = set()
        for part in parts:
            family = part.split(".")[0]
            hiding = [law for name in (family, part) for law in HIDDEN_BY.get(name, ()) if law in broken]
            if hiding:
                say.tried(part, f"not judged while {hiding[0]} is broken")
            elif family in broken:
                say.tried(part, f"not tried: {family} is broken")
            else:
                breach = _try(s, part)
                if breach is None:
                    say.tried(part, "holds")
                elif claimed and exempt(target.config, part):
                    failed.add(part)
                    say.tried(part, "exempt")
                else:
                    broken[family] = breach
                    say.tried(part, "BROKEN")
        for name, reason in claimed.items():
            tried = set(parts_of(name)) & set(parts)
            if tried == set(parts_of(name)) and not tried & failed and name.split(".")[0] not in broken:
                message = f"exempt from {name!r} ({reason}), which it obeys: remove the exemption"
                broken["exemptions"] = Breach(message, law="exemptions")
    for breach in broken.values():
        breach.subject = target.label
    return list(broken.values())


def _try(s: Subject, part: str) -> Breach | None:
    """The breach of one law; an exception in the module is also a breach."""
    try:
        LAWS[part](s)
    except Breach as breach:
        return breach
    except Exception as error:
        return _raised(error, part)
    return None


def _raised(error: Exception, part: str) -> Breach:
    """An exception that a call raises, as a breach of the law that made the call."""
    lines = str(error).strip().splitlines() or [""]
    return Breach(f"a call raises {type(error).__name__}: {lines[0]}", law=part)


class _Progress:
    """Lines on stderr: each tried law and its result."""

    def __init__(self, label: str, total: int, active: bool):
        self.label, self.total, self.active = label, total, active
        self.done, self.since = 0, time.perf_counter()

    def tried(self, part: str, outcome: str) -> None:
        self.done += 1
        now = time.perf_counter()
        if self.active:
            line = f"[{self.done:2}/{self.total}] {self.label}: {part:32} {outcome:10} {now - self.since:5.1f} s"
            print(line, file=sys.stderr, flush=True)
        self.since = now


def _how_it_runs(target: Target) -> tuple[int, bool]:
    """(model width, whether it computes in float64): the first width that the mixer accepts, and float32 if the module
    always computes in float32. Raises UserError if it cannot be built or called."""
    dims = (16,) if isinstance(target.config, ModelConfig) else DIMS
    first = None
    for dim in dims:
        for wide in (True, False):
            try:
                with jax.enable_x64(wide):
                    narrow = _traced(target.config, dim, wide)
            except UserError:
                raise
            except Exception as error:
                first = error if wide and first is None else first
                continue
            if not (wide and narrow):
                return dim, wide
    if target.path is not None:
        plugins.run(target.path, lambda: _raise(first))
    lines = str(first).strip().splitlines() or [""]
    raise UserError(f"{target.label} cannot be built or called: {type(first).__name__}: {lines[0]}") from first


def _raise(error: Exception) -> None:
    raise error


def _traced(config: Any, dim: int, wide: bool) -> bool:
    """Traces one call; whether a floating-point number narrower than the inputs occurs in it."""
    is_model = isinstance(config, ModelConfig)
    dtype = np.float64 if wide else np.float32
    build = (lambda: config.build(rngs=nnx.Rngs(0))) if is_model else (lambda: config.build(dim, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(nnx.eval_shape(build))
    state = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype) if is_float(p) else p, state)
    x = jax.ShapeDtypeStruct((2, 5), np.int32) if is_model else jax.ShapeDtypeStruct((2, 5, dim), dtype)

    def call(state, x):
        module = nnx.merge(graphdef, state)
        if is_model:
            return module.logits(module(x, None, segment_ids=None)[0])
        y, after = module(x, module.init_state(2), None)
        if y.shape != x.shape:
            raise UserError(f"the mixer turns an input [2, 5, {dim}] into {list(y.shape)}; it must keep the shape.")
        return y, after

    jaxpr = jax.make_jaxpr(call)(state, x)
    return _holds_narrow(jaxpr.jaxpr, np.dtype(dtype).itemsize)


def _holds_narrow(jaxpr: Any, itemsize: int) -> bool:
    """Whether a jaxpr, or one inside it, computes a floating-point array of fewer bytes per number."""
    for eqn in jaxpr.eqns:
        for out in eqn.outvars:
            dtype = getattr(out.aval, "dtype", None)
            if dtype is not None and jax.numpy.issubdtype(dtype, np.floating) and dtype.itemsize < itemsize:
                return True
        for value in eqn.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns") and _holds_narrow(inner, itemsize):
                    return True
    return False
