"""The host process: keeping the memory that a CPU program frees and asks for again in every step."""

import ctypes
import sys

import jax

# Parameters of glibc's mallopt, and what they are set to.
_NO_MAPPING = (-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
_NO_TRIMMING = (-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory mapped, where programs run on the CPU. Returns whether it does.

    XLA allocates a CPU program's temporaries anew for every call. By default glibc gives blocks of that size back to
    the system at once, and every call pays a page fault per 4 KiB (measured: a fifth of the time of a step of the
    quickstart, 190,000 faults). Only the heap of the process's first thread can hold blocks above 64 MB, so programs
    are run by the thread that calls them, not handed to another: on the CPU a step has ended when its call returns.
    Where JAX has started already it keeps its threads, and of large blocks those up to 64 MB are kept.
    (A single heap for all threads keeps large blocks as well, but the compiler's threads wait for each other at it:
    20 s instead of 16 s to the quickstart's first step on two cores, and 5 GB instead of 2 GB.) A process that does not
    train gets the same from the environment variables MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1 and from
    `jax.config.update("jax_cpu_enable_async_dispatch", False)`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None  # musl: none
    if mallopt is None:
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # before the next line, which starts JAX
    if jax.default_backend() != "cpu":
        return False
    return all([mallopt(*_NO_MAPPING) == 1, mallopt(*_NO_TRIMMING) == 1])
