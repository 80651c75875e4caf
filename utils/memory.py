"""glibc malloc settings, so that freed memory stays in the process for the next tensors; free shared memory."""

import ctypes
import os
import sys
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_DEFAULTS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}  # the highest that glibc adapts to
_KEEPING = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1}


@contextmanager
def keep_freed_memory():
    """Within this block glibc keeps freed memory blocks of up to 1 GiB for the next CPU tensors.

    By default it returns them to the kernel at once, which must then zero new pages for each tensor; that can take half
    of the time. Results are the same. Does nothing with other C libraries.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(library, "mallopt"):
        yield
        return
    _set(library, _KEEPING)
    try:
        yield
    finally:
        _set(library, _DEFAULTS)
        library.malloc_trim(0)


def _set(library, values):
    for option, value in values.items():
        library.mallopt(option, value)


def free_shared_memory(folder="/dev/shm"):
    """Free bytes of the file system that holds shared memory: 0 if it cannot be written, None where there is no limit.

    It has a size of its own on Linux only; containers often have 64 MB.
    """
    if sys.platform != "linux":
        return None
    try:
        system = os.statvfs(folder)
    except OSError:
        return 0
    is_writable = not system.f_flag & os.ST_RDONLY and os.access(folder, os.W_OK)
    return system.f_bavail * system.f_frsize if is_writable else 0
