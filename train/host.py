"""The host process: keeping the memory that a CPU program frees and asks for again in every step."""

import ctypes
import sys

import jax

# Parameters of glibc's mallopt, and what they are set to.
_ONE_ARENA = (-8, 1)  # M_ARENA_MAX: threads share one heap; with one of its own, a thread maps blocks above 64 MB anew
_NO_MAPPING = (-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
_NO_TRIMMING = (-1, -1)  # M_TRIM_THRESHOLD: the heap is never given back


def keep_freed_memory() -> bool:
    """Lets glibc keep freed memory mapped, where programs run on the CPU. Returns whether it does.

    XLA allocates a CPU program's temporaries anew for every call. By default glibc gives blocks of that size back to
    the system at once, and every call pays a page fault per 4 KiB (measured: a fifth of the time of a step of the
    quickstart, 190,000 faults). Blocks of any size are kept only where this is called before JAX starts its threads,
    else those of up to 64 MB. The environment variables MALLOC_ARENA_MAX, MALLOC_MMAP_MAX_ and MALLOC_TRIM_THRESHOLD_
    do the same for a process that does not train.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None  # musl: none
    if mallopt is None:
        return False
    shared = mallopt(*_ONE_ARENA)  # before the next line, which starts threads; hosts of a GPU or TPU allocate little
    if jax.default_backend() != "cpu":
        return False
    return all([shared == 1, mallopt(*_NO_MAPPING) == 1, mallopt(*_NO_TRIMMING) == 1])
