"""Devices that programs can be compiled for on a machine without them, and the figures of their data sheets.

XLA compiles ahead of time for a described topology. It needs the platform's compiler, which comes with an extra of this
package (`Target.extra`), and no driver or device.
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

from engrax.errors import UserError
from engrax.pallas_kernels import devices
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX
from engrax.registry import did_you_mean

# What XLA asks about an H200 (compute capability 9.0), as its data sheet has it.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000 l2_cache_size: 52428800
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""
TPU_SLICES = {1: "2x2", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
GPUS_PER_HOST = 8
# Set before a backend starts: none is looked for, and no device is asked for its surroundings or its driver.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


class Target(NamedTuple):
    """A device that can be compiled for. None: the figure is not known."""

    device: devices.Device
    memory_bytes: int | None  # that a program can have
    link_bytes_per_second: float | None  # to other devices, in one direction
    extra: str | None  # of this package, with the compiler
    compilers: tuple[str, ...]  # modules of which one must be installed


_CUDA = ("jax_cuda13_plugin", "jax_cuda12_plugin")
TARGETS = {  # a TPU's runtime keeps a part of its 16 or 32 GiB
    "h200": Target(devices.NAMED["h200"], 150_000_000_000, 450e9, "cuda", _CUDA),
    "v5e": Target(devices.NAMED["v5e"], 15 * 2**30 + 3 * 2**28, 200e9, "tpu", ("libtpu",)),
    "v6e": Target(devices.NAMED["v6e"], 31 * 2**30 + 2**28, 448e9, "tpu", ("libtpu",)),
    "cpu": Target(devices.NAMED["cpu"], None, None, None, ()),
}


def find(name: str) -> Target:
    """Returns the target of this name. Raises UserError for an unknown one, and where its compiler is not installed."""
    if name not in TARGETS:
        known = ", ".join(TARGETS)
        raise UserError(f"cannot compile for {name!r}{did_you_mean(name, TARGETS)} (known: {known}).")
    if jax.__version_info__[:3] < KERNELS_NEED_JAX:
        needed = ".".join(map(str, KERNELS_NEED_JAX))
        raise UserError(f"compiling for {name} needs jax >= {needed} (Python >= 3.12), this is {jax.__version__}.")
    target = TARGETS[name]
    if target.compilers and not any(map(importlib.util.find_spec, target.compilers)):
        raise UserError(
            f"compiling for {name} needs its compiler, which is not installed; "
            f"run pip install 'engrax[{target.extra}]'."
        )
    return target


def prepare() -> None:
    """Sets what compiling for absent devices needs: for a process that does nothing else, before a backend starts."""
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # a program from the cache is not compiled


def topology_devices(target: Target, count: int) -> list[Any]:
    """Returns `count` devices of a described topology; for the CPU, devices of this process. Raises UserError for a
    number that no topology has."""
    from jax.experimental import topologies

    if target.device.platform == "cpu":
        return _here(count)
    if target.device.platform == "tpu":
        if count not in TPU_SLICES:
            known = ", ".join(map(str, TPU_SLICES))
            raise UserError(f"no slice of {target.device.kind} has {count} devices; choose a mesh of {known} devices.")
        name = f"{target.device.architecture}:{TPU_SLICES[count]}"
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices[:count]
    hosts, rest = divmod(count, GPUS_PER_HOST)
    if hosts and rest:
        raise UserError(f"{count} GPUs do not fill hosts of {GPUS_PER_HOST}; choose at most 8, or a multiple of 8.")
    shape = f"1x{hosts}x{GPUS_PER_HOST}" if hosts else f"1x1x{count}"
    return topologies.get_topology_desc(platform="cuda", topology_name="", topology=shape, target_config=H200).devices


def _here(count: int) -> list[Any]:
    found = jax.devices("cpu")
    if count > len(found):
        raise UserError(
            f"a mesh of {count} CPU devices needs as many here, there are {len(found)}; set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return found[:count]
