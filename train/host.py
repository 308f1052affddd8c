"""Memory of the host process: freed blocks are kept and reused by the next step of a CPU program."""

import ctypes
import sys

import jax

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
