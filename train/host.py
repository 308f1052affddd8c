"""The host process: keeping the memory that a CPU program frees and asks for again in every step."""

import ctypes
import sys

import jax

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # parameters of glibc's mallopt
_KEEP_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Lets glibc keep up to 1 GiB of freed memory mapped, where programs run on the CPU. Returns whether it does.

    XLA allocates a CPU program's temporaries anew for every call. By default glibc gives blocks of that size back to
    the system at once, and every call pays a page fault per 4 KiB (measured: a quarter of the CPU time of a step of the
    neural memory layer). It reaches blocks of up to 64 MB, glibc's limit where a thread of a pool allocates. The
    environment variables MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ do the same for a process
    that does not train.
    """
    if jax.default_backend() != "cpu" or not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    settings = ((_MMAP_THRESHOLD, _KEEP_BYTES), (_TRIM_THRESHOLD, _KEEP_BYTES), (_TOP_PAD, 2**26))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
