"""Which implementation of an operation serves a call: what can run here, what an explicit name may ask, the choice.

An operation is a folder `engrax.pallas_kernels.<op>` whose `__init__` names its `IMPLEMENTATIONS` and, for the others,
why they are `MISSING`. An implementation with a kernel is a module of that folder (`MODULES`) with

    unsupported(shapes) -> str | None                              why it cannot serve a call of these sizes
    forward(plan, inputs) -> (outputs, residuals)
    backward(plan, inputs, residuals, cotangents) -> cotangents of inputs

as has `xla`, without the first.

A kernel takes part in the automatic choice where its device is in sight: a device of this process or an abstract one
(`jax.sharding.use_abstract_mesh` with an `AbstractDevice`, which is how a program is compiled or exported for hardware
that is not here). Elsewhere it is neither imported nor traced, so that it costs a program for the CPU nothing.
"""

import importlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from engrax.registry import did_you_mean

OPERATIONS = ("gated_delta_rule", "hopfield_retrieval", "linear_attention", "linear_cross_entropy", "neural_memory")
KERNELS_NEED_JAX = (0, 11, 2)
MODULES = {"xla": "xla", "pallas_gpu": "gpu", "pallas_tpu": "tpu"}
PLATFORMS = {"pallas_gpu": "cuda", "pallas_tpu": "tpu"}
KERNELS = tuple(PLATFORMS)
NAMES = ("reference", *MODULES)


class Availability(NamedTuple):
    """What `available` returns: the implementations that can run here, and for the others the reason."""

    names: tuple[str, ...]
    missing: dict[str, str]


class LogDecayShapes(NamedTuple):
    """What a kernel of a log-decay operation is asked to serve; `length` is a multiple of `chunk`."""

    batch: int
    length: int
    query_heads: int
    heads: int
    key: int
    value: int
    chunk: int
    dtype: np.dtype  # of q, k and v as the kernel gets them
    gate: str  # "none", "scalar" or "channel"
    segments: bool  # states per segment: a chunk may begin from another state than its predecessor's


class LogDecayPlan(NamedTuple):
    """What is static about a call of a log-decay operation.

    implementation: the name asked for, None = by platform; candidates: the names that can serve these sizes.
    interpret: kernels are interpreted (`interpreted_kernels`).
    """

    chunk: int
    scale: float
    implementation: str | None
    candidates: tuple[str, ...]
    interpret: bool = False


def available(op: str) -> Availability:
    """Returns the implementations of operation `op` that can run here, and for the others the reason.

    Raises ValueError for an unknown operation.
    """
    if op not in OPERATIONS:
        known = ", ".join(OPERATIONS)
        raise ValueError(f"unknown operation {op!r}{did_you_mean(str(op), OPERATIONS)} (known: {known}).")
    package = importlib.import_module(f"engrax.pallas_kernels.{op}")
    missing = dict(package.MISSING)
    missing |= {name: reason for name in package.IMPLEMENTATIONS if (reason := _no_device(name))}
    return Availability(tuple(name for name in package.IMPLEMENTATIONS if name not in missing), missing)


def load(op: str, name: str):
    """Returns the module that holds implementation `name` of operation `op`."""
    return importlib.import_module(f"engrax.pallas_kernels.{op}.{MODULES[name]}")


def unsupported_kernels(op: str, shapes: Any, implementation: str | None = None) -> dict[str, str]:
    """Returns the kernels that cannot serve a call, and why: their device is not in sight, or these sizes.

    implementation: the name asked for, if any: of that kernel only the sizes count here (`choose` sees to the device).
    """
    package = importlib.import_module(f"engrax.pallas_kernels.{op}")
    reasons = dict(package.MISSING)
    for name in package.IMPLEMENTATIONS:
        if name in KERNELS:
            absent = _old_jax() if name == implementation else _no_device(name)
            if reason := absent or load(op, name).unsupported(shapes):
                reasons[name] = reason
    return reasons


def choose(implementation: str | None, unsupported: Mapping[str, str]) -> str | None:
    """Returns the name as it is, None for the automatic choice.

    unsupported: the kernels that cannot serve this call, and why (`unsupported_kernels`).
    Raises ValueError for an unknown name, NotImplementedError for one that cannot serve this call here.
    """
    if implementation is None:
        return None
    if implementation not in NAMES:
        near = did_you_mean(str(implementation), NAMES)
        raise ValueError(f"unknown implementation {implementation!r}{near} (known: {', '.join(NAMES)}).")
    reason = unsupported.get(implementation) or (None if interpreting() else _no_device(implementation))
    if reason:
        raise NotImplementedError(f"{implementation!r} cannot run: {reason}; use 'xla' or None.")
    return implementation


def by_platform(name: str | None, branches: Mapping[str, Callable], *args):
    """Calls the branch called `name`, or for None the one for the platform that the program is lowered for.

    The choice by platform happens at lowering time and traces every branch: the caller leaves out those that cannot
    serve the call (`unsupported_kernels`). `branches` always holds "xla".
    """
    if name is not None:
        return branches[name](*args)
    kernels = {PLATFORMS[kind]: branches[kind] for kind in KERNELS if kind in branches}
    return jax.lax.platform_dependent(*args, default=branches["xla"], **kernels) if kernels else branches["xla"](*args)


_local = threading.local()


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Within it, kernels asked for by name run on any device, interpreted: slow, for tests."""
    before, _local.interpret = interpreting(), True
    try:
        yield
    finally:
        _local.interpret = before


def interpreting() -> bool:
    """Whether kernels are interpreted here. Belongs into every jit cache key: operations carry it in their plan."""
    return getattr(_local, "interpret", False)


def _old_jax() -> str | None:
    if jax.__version_info__[:3] >= KERNELS_NEED_JAX:
        return None
    return f"kernels need jax >= {'.'.join(map(str, KERNELS_NEED_JAX))}, this is {jax.__version__}"


def _no_device(name: str) -> str | None:
    """Returns why no device of this process runs implementation `name`, None where one does."""
    if name not in KERNELS:
        return None
    if reason := _old_jax():
        return reason
    if _abstract_platform() == PLATFORMS[name]:
        return None
    devices = _devices(PLATFORMS[name])
    if not devices:
        return f"it needs a {'GPU of compute capability 9.0' if name == 'pallas_gpu' else 'TPU'}, none is here"
    if name == "pallas_gpu" and not _all_sm_90(devices):
        return f"it needs a GPU of compute capability 9.0 (sm_90), this is {devices[0].device_kind}"
    return None


def _all_sm_90(devices) -> bool:
    return all(getattr(device, "compute_capability", None) == "9.0" for device in devices)


def _abstract_platform() -> str | None:
    """The platform of the abstract device that a program is being lowered for, None where there is none."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None)


@cache
def _devices(platform: str) -> tuple:
    try:
        return tuple(jax.local_devices(backend=platform))
    except RuntimeError:  # no such backend in this process
        return ()
