"""`engrax doctor`: tells what this machine offers engrax, and what an issue report needs."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from engrax.commands.common import parser_of

EXAMPLE = "engrax doctor"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "safetensors", "tokenizers")
OPTIONAL = ("jax-cuda13-plugin", "jax-cuda12-plugin", "libtpu", "tensorflow-datasets", "wandb", "tensorboardX")
VARIABLES = ("ENGRAX_", "JAX_", "XLA_", "CUDA_VISIBLE_DEVICES", "LIBTPU_INIT_ARGS", "MPLBACKEND")


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser_of(
        "doctor",
        EXAMPLE,
        "Prints versions, devices, which kernels can run here and why the others cannot, caches and disk space. Paste "
        "it into an issue report.",
    ).parse_args(args)
    for name, value in _facts():
        print(f"{name:<22} {value}")
    return 0


def _facts() -> Iterator[tuple[str, str]]:
    """(name, value) of every line."""
    import engrax
    from engrax import files
    from engrax.train import host

    yield "engrax", f"{engrax.__version__} in {Path(engrax.__file__).parent}"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        yield package, _version(package) or "not installed, but needed: install engrax again"
    for package in OPTIONAL:
        yield package, _version(package) or "not installed (optional)"
    yield "processors", f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}"
    yield from _devices()
    cache = files.cache_folder()
    yield "cache", f"{cache} ({_size(cache)})"
    yield "compiled programs", str(host.keep_compiled_programs() or "not kept")
    yield "free disk space", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB here"
    for name in sorted(os.environ):
        if name.startswith(VARIABLES) and "KEY" not in name and "TOKEN" not in name:
            yield f"${name}", os.environ[name]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    """The devices, and the implementations of every operation on them."""
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:  # a driver that does not answer, for example
        yield "devices", f"none: {str(error).splitlines()[0]}"
        return
    kinds = [device.device_kind for device in devices]
    yield "devices", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    from engrax.pallas_kernels import available, dispatch

    for op in dispatch.OPERATIONS:
        found = available(op)
        yield op, ", ".join(found.names)
        for name, reason in found.missing.items():
            yield "", f"no {name}: {reason}"


def _size(folder: Path) -> str:
    """The size of all files below a folder, in words."""
    if not folder.is_dir():
        return "not there yet"
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return f"{total / 2**30:.2f} GiB"
