"""What later work on this machine reuses: memory that a CPU program has freed, and compiled programs."""

import ctypes
import hashlib
import os
import platform
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from engrax.files import cache_folder

LEAST_SECONDS = 0.2  # of compilation, for a program to be kept
MOST_BYTES = 4 << 30  # of kept programs

# Parameters of glibc's mallopt, and what they are set to.
_NO_MAPPING = (-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
_NO_TRIMMING = (-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory mapped when programs run on the CPU. Returns whether it does.

    XLA allocates the temporaries of a CPU program in every call. By default glibc returns large blocks to the system at
    once, and every call pays a page fault per 4 KiB (docs/operations.md has the measurement). Only the heap of the
    process's first thread can hold blocks above 64 MB, so the calling thread runs the programs: on the CPU a step has
    ended when its call returns. If JAX has already started, it keeps its threads, and only blocks up to 64 MB are kept.

    A process that does not train gets the same with the environment variables MALLOC_MMAP_MAX_=0 and
    MALLOC_TRIM_THRESHOLD_=-1 and `jax.config.update("jax_cpu_enable_async_dispatch", False)`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None  # musl: none
    if mallopt is None:
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the next line, which starts JAX
    if jax.default_backend() != "cpu":
        return False
    return all([mallopt(*_NO_MAPPING) == 1, mallopt(*_NO_TRIMMING) == 1])


def keep_compiled_programs() -> Path | None:
    """Keeps compiled programs for later processes, in `programs` of the cache folder. Returns the folder.

    None: the user has turned this off (JAX_ENABLE_COMPILATION_CACHE=0) or chosen a folder (JAX_COMPILATION_CACHE_DIR),
    or the folder cannot be written. Every kind of processor has a folder of its own, since a program for one may not
    run on another. Programs that were not used for longest are deleted beyond `MOST_BYTES`.
    """
    if not jax.config.jax_enable_compilation_cache or jax.config.jax_compilation_cache_dir:
        return None
    folder = cache_folder() / "programs" / _processor()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_oldest(folder)
    except OSError:
        return None
    if not os.access(folder, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    if jax.config.jax_persistent_cache_min_compile_time_secs == 1.0:  # JAX's default
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    compilation_cache.reset_cache()  # JAX looks for a folder once, at its first program
    return folder


def _processor() -> str:
    """The machine's architecture, and a digest of its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [platform.processor()]
    sets = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{hashlib.sha256(sets.encode()).hexdigest()[:8]}"


def _delete_oldest(folder: Path) -> None:
    """Deletes files, the least recently read first, until the others take at most `MOST_BYTES`."""
    found = [(path, path.stat()) for path in folder.iterdir() if path.is_file()]
    total = sum(stat.st_size for _, stat in found)
    for path, stat in sorted(found, key=lambda entry: max(entry[1].st_atime, entry[1].st_mtime)):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= stat.st_size
