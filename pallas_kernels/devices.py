"""The device that a program is traced for: its platform and its architecture.

It is the device of the active mesh (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`). The mesh may be abstract or
belong to a topology, so programs can be compiled or exported for absent hardware. Without a mesh, it is this process's
device.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh

from engrax.registry import did_you_mean

# Device kinds as JAX reports them. Other kinds have no known architecture.
ARCHITECTURES = {
    "cuda": (
        (r"A(100|800)", "sm_80"),
        (r"(G?H(100|200)|H800|H20)", "sm_90"),
        (r"G?B(100|200)", "sm_100"),
        (r"G?B300", "sm_103"),
    ),
    "tpu": (
        (r"TPU v4", "v4"),
        (r"TPU v5( lite|e)", "v5e"),
        (r"TPU v5p?", "v5p"),
        (r"TPU v6( lite|e)", "v6e"),
        (r"TPU ?(v7x?|7x)", "v7x"),
    ),
}


class Device(NamedTuple):
    """A device in sight. architecture: for example "sm_90" or "v5e"; None if the kind is unknown."""

    platform: str  # as programs are lowered for it: "cuda", "rocm", "tpu", "cpu"
    kind: str
    architecture: str | None


NAMED = {
    "h100": Device("cuda", "NVIDIA H100 80GB HBM3", "sm_90"),
    "h200": Device("cuda", "NVIDIA H200", "sm_90"),
    "b200": Device("cuda", "NVIDIA B200", "sm_100"),
    "v5e": Device("tpu", "TPU v5 lite", "v5e"),
    "v6e": Device("tpu", "TPU v6 lite", "v6e"),
    "cpu": Device("cpu", "cpu", None),
}


def find(name: str) -> Device:
    """Returns the device of this name in `NAMED`. Raises ValueError for an unknown name."""
    if name not in NAMED:
        raise ValueError(f"unknown device {name!r}{did_you_mean(name, NAMED)} (known: {', '.join(NAMED)}).")
    return NAMED[name]


def in_sight() -> tuple[Device, ...]:
    """Returns the devices that a program traced here may run on, each kind once: the mesh's, or this process's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if device is not None:
        return (_device(device.platform, device.device_kind),)
    return _of_process()


@contextmanager
def use(device: Device) -> Iterator[None]:
    """A context in which programs are traced for one such device. Needs a jax with `jax.sharding.AbstractDevice`."""
    abstract = jax.sharding.AbstractDevice(device_kind=device.kind, num_cores=None, platform=device.platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=abstract)):
        yield


@cache
def _of_process() -> tuple[Device, ...]:
    found = []
    for platform in ARCHITECTURES:
        try:
            devices = jax.local_devices(backend=platform)
        except RuntimeError:  # this process lacks the backend
            continue
        found += [_device(platform, d.device_kind, getattr(d, "compute_capability", None)) for d in devices]
    return tuple(dict.fromkeys(found))


def _device(platform: str, kind: str, compute_capability: str | None = None) -> Device:
    if platform == "gpu":  # the platform name of a concrete device
        platform = "cuda" if kind.startswith("NVIDIA") or compute_capability else "rocm"
    if platform == "cuda" and compute_capability:
        return Device(platform, kind, "sm_" + compute_capability.replace(".", ""))
    for pattern, architecture in ARCHITECTURES.get(platform, ()):
        if re.search(rf"\b{pattern}\b", kind):
            return Device(platform, kind, architecture)
    return Device(platform, kind, None)
