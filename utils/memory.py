"""Memory that is freed stays with the process, for what is computed next."""

import ctypes
import sys
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}  # to which glibc raises them by itself
_KEEPING = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1}


@contextmanager
def keep_freed_memory():
    """Within this block, which computes tensors on a CPU, blocks up to 1 GiB that are freed are used again.

    The C library of Linux (glibc) would give them back at once, and the system fill new ones with zeros for each
    tensor, which can take half of the time. Numbers are the same. Does nothing with other C libraries.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        yield
        return
    _set(library, _KEEPING)
    try:
        yield
    finally:
        _set(library, _USUAL)
        library.malloc_trim(0)


def _set(library, values):
    for option, value in values.items():
        library.mallopt(option, value)
