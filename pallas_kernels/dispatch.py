"""Chooses the implementation of an operation that serves a call.

An operation is a folder `engrax.pallas_kernels.<op>`. Its `__init__` lists its `IMPLEMENTATIONS` in order, and says why
others are `MISSING`. The automatic choice takes, per platform, the first implementation made for the architecture in
sight (`devices.in_sight`) that supports the sizes, or else the first that runs anywhere. Sizes and architecture are
checked when a call is traced, the platform when its program is lowered. A kernel whose device is not in sight is
neither imported nor traced, so it adds no cost to a CPU program.

A kernel is one file and one line in the list, `kernel(name, platform, architectures, module)`. The file defines

    unsupported(shapes) -> str | None     why it cannot serve a call of these sizes
    passes: Passes                        its forward and backward pass (`passes`)

where `shapes` is the operation's description of a call (`LogDecayShapes`, `MemoryShapes`, `RetrievalShapes`,
`GroupedShapes`).
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from engrax.errors import CannotRun, UserError
from engrax.pallas_kernels import devices
from engrax.pallas_kernels.passes import Passes, run_by_platform
from engrax.registry import did_you_mean

OPERATIONS = (
    "gated_delta_rule",
    "grouped_matmul",
    "hopfield_retrieval",
    "linear_attention",
    "linear_cross_entropy",
    "neural_memory",
    "softmax_attention",
)
KERNELS_NEED_JAX = (0, 11, 2)
REFERENCE = "reference"  # the oracle, never chosen automatically


@dataclass(frozen=True)
class Later:
    """An attribute of a module that is imported on first use."""

    module: str
    name: str

    def load(self) -> Any:
        """Returns the attribute."""
        return getattr(importlib.import_module(self.module), self.name)

    def __call__(self, *args, **kwargs):
        return self.load()(*args, **kwargs)


def installed() -> None:
    """The `not_installed` of an implementation that engrax itself holds."""


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    name: its name in `implementation=` and `available`, unique in its list. platform: "cuda" or "tpu"; None: any.
    architectures: of the platform, for example ("sm_90",); None: all known ones. supports(shapes): why it cannot serve
    a call of these sizes, or None if it can. call(plan, inputs): the operation's core, `Passes`; the reference's takes
    the operation's arguments instead. not_installed(): why this process lacks what it needs to be traced, or None.
    """

    name: str
    platform: str | None
    architectures: tuple[str, ...] | None
    supports: Callable[[Any], str | None]
    call: Callable
    not_installed: Callable[[], str | None] = installed

    @property
    def passes(self) -> Passes:
        """The forward and backward pass; imports the kernel."""
        return self.call.load() if isinstance(self.call, Later) else self.call


def kernel(name: str, platform: str, architectures: tuple[str, ...] | None, module: str) -> Implementation:
    """Returns the implementation in a module, which is imported on first use."""
    return Implementation(name, platform, architectures, Later(module, "unsupported"), Later(module, "passes"))


def everywhere(name: str, module: str, attribute: str = "passes") -> Implementation:
    """Returns an implementation that runs on any device and serves every call."""
    return Implementation(name, None, None, serves_all, Later(module, attribute))


def serves_all(shapes: Any) -> None:
    """The `supports` of an implementation that serves every call."""


class Availability(NamedTuple):
    """The result of `available`: the implementations that can run here, and why the others cannot."""

    names: tuple[str, ...]
    missing: dict[str, str]


class Choice(NamedTuple):
    """The implementations that may serve a call. Static: part of every jit cache key.

    branches: (platform, implementation) pairs, the last for all other platforms; only one if requested by name.
    interpret: interprets kernels (`interpreted_kernels`).
    """

    branches: tuple[tuple[str | None, Implementation], ...]
    interpret: bool = False

    @property
    def reference(self) -> bool:
        """Whether the reference was requested."""
        return self.branches[0][1].name == REFERENCE

    def run(self, plan: Any, inputs: Any) -> Any:
        """Returns the outputs of the operation's core from the implementation for the program's platform."""
        if len(self.branches) == 1:
            return self.branches[0][1].call(plan, inputs)
        return run_by_platform(tuple((platform, found.passes) for platform, found in self.branches), plan, inputs)


class Call(NamedTuple):
    """A call of an operation, collected by `recorded_calls`. asked: the caller's `implementation`."""

    op: str
    shapes: Any
    asked: str | None


class Served(NamedTuple):
    """Which implementation serves a call on a device, and why each other one, in order, does not."""

    by: str
    others: dict[str, str]


def implementations(op: str) -> tuple[Implementation, ...]:
    """Returns an operation's implementations in order. Raises ValueError for an unknown operation."""
    if op not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise ValueError(f"unknown operation {op!r}{did_you_mean(str(op), OPERATIONS)} (known: {known}).")
    return _package(op).IMPLEMENTATIONS


def implementation(op: str, name: str) -> Implementation:
    """Returns the implementation of this name. Raises KeyError if there is none."""
    return {found.name: found for found in implementations(op)}[name]


def available(op: str) -> Availability:
    """Returns the implementations of operation `op` that can run here, and why the others cannot.

    Raises ValueError for an unknown operation.
    """
    missing, names = {}, []
    for found in reversed(implementations(op)):
        reason = _no_device(found, devices.in_sight()) or found.not_installed()
        missing |= {found.name: reason} if reason else {}
        names += [] if reason else [found.name]
    return Availability(tuple(names), dict(_package(op).MISSING) | missing)


def choose(op: str, shapes: Any, asked: str | None = None) -> Choice:
    """Returns the implementations that may serve a call: the one named `asked`, or for None one per platform.

    shapes: the operation's description of a call for its kernels.
    Raises ValueError for an unknown name, NotImplementedError for one that cannot serve this call here.
    """
    listed = implementations(op)
    if (calls := getattr(_local, "calls", None)) is not None:
        calls.append(Call(op, shapes, asked))
    if asked is not None:
        return Choice(((None, _named(op, listed, shapes, asked)),), interpreting())
    branches, sight = {}, devices.in_sight()
    for found in listed:
        if found.name in getattr(_local, "without", ()):
            continue
        if found.platform not in branches and not (_why_not(found, shapes, sight) or found.not_installed()):
            branches[found.platform] = found
            if found.platform is None:
                break
    return Choice(tuple(branches.items()), interpreting())


def explain(call: Call, device: devices.Device) -> Served:
    """Returns which implementation would serve a recorded call on a device, and why the others would not.

    The libraries that the device needs (`not_installed`) count as present.
    """
    by, others = call.asked, {}
    for found in implementations(call.op):
        if found.name == call.asked:
            continue
        if call.asked is not None:
            others[found.name] = f"the caller asks for {call.asked!r}"
        elif reason := _why_not(found, call.shapes, (device,)):
            others[found.name] = reason
        elif by is None:
            by = found.name
        else:
            others[found.name] = "only by its name: the oracle" if found.name == REFERENCE else f"{by!r} comes first"
    return Served(by, dict(_package(call.op).MISSING) | others)


def _named(op: str, listed: tuple[Implementation, ...], shapes: Any, asked: str) -> Implementation:
    missing = _package(op).MISSING
    by_name = {found.name: found for found in listed}
    names = (*reversed(by_name), *missing)
    if asked not in names:
        raise UserError(
            f"unknown implementation {asked!r}{did_you_mean(str(asked), names)} (known: {', '.join(names)})."
        )
    if asked in missing:
        reason = missing[asked]
    else:
        found = by_name[asked]
        reason = (found.platform and _old_jax()) or found.supports(shapes)
        reason = reason or (None if interpreting() else _no_device(found, devices.in_sight()))
        reason = reason or found.not_installed()
    if reason:
        raise CannotRun(f"{asked!r} cannot run: {reason}; use 'xla' or None.")
    return found


def _why_not(found: Implementation, shapes: Any, sight: tuple[devices.Device, ...]) -> str | None:
    """Returns why an implementation cannot serve a call on the devices in sight; imports it only if one device fits."""
    return _no_device(found, sight) or found.supports(shapes)


def _package(op: str):
    return importlib.import_module(f"engrax.pallas_kernels.{op}")


_local = threading.local()


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """A context that adds every traced call of an operation to the list."""
    before, _local.calls = getattr(_local, "calls", None), []
    try:
        yield _local.calls
    finally:
        _local.calls = before


@contextmanager
def without(*names: str) -> Iterator[None]:
    """A context in which implementations of these names are not chosen automatically."""
    before, _local.without = getattr(_local, "without", ()), names
    try:
        yield
    finally:
        _local.without = before


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """A context in which kernels requested by name run on any device, interpreted: slow, for tests."""
    before, _local.interpret = interpreting(), True
    try:
        yield
    finally:
        _local.interpret = before


def interpreting() -> bool:
    """Whether kernels are interpreted here. Must be part of every jit cache key; a `Choice` carries it."""
    return getattr(_local, "interpret", False)


def _old_jax() -> str | None:
    if jax.__version_info__[:3] >= KERNELS_NEED_JAX:
        return None
    return f"kernels need jax >= {'.'.join(map(str, KERNELS_NEED_JAX))}, this is {jax.__version__}"


def _no_device(found: Implementation, sight: tuple[devices.Device, ...]) -> str | None:
    """Returns why no device in sight runs an implementation, or None if one does."""
    if found.platform is None:
        return None
    if reason := _old_jax():
        return reason
    needs = _needs(found)
    own = [device for device in sight if device.platform == found.platform]
    if not own:
        return f"it needs a {needs}, {f'this is {sight[0].kind}' if sight else 'none is here'}"
    for device in own:
        if device.architecture is None:
            return f"it needs a {needs}, and the architecture of {device.kind!r} is not known"
        if found.architectures is not None and device.architecture not in found.architectures:
            return f"it needs a {needs} ({', '.join(found.architectures)}), this is {device.kind}"
    return None


def _needs(found: Implementation) -> str:
    """Returns the hardware of an implementation in words: "GPU of compute capability 9.0", "TPU v5e or v6e"."""
    if found.platform != "cuda":
        return " ".join([found.platform.upper(), " or ".join(found.architectures or ())]).strip()
    capabilities = [f"{name[3:-1]}.{name[-1]}" for name in found.architectures or ()]
    return f"GPU of compute capability {' or '.join(capabilities)}" if capabilities else "GPU"
