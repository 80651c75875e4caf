"""Memory: glibc's malloc settings, so that freed memory stays for the next tensors; what is available; limits."""

import ctypes
import os
import re
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from utils.cli import InputError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_DEFAULTS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}  # the highest that glibc adapts to
_KEEPING = {_MMAP_THRESHOLD: 1 << 30, _TRIM_THRESHOLD: (1 << 31) - 1}


@contextmanager
def keep_freed_memory():
    """Within this block glibc keeps freed memory blocks of up to 1 GiB for the next CPU tensors.

    By default it returns them to the kernel at once, which must then zero new pages for each tensor; that can take half
    of the time. Results are the same. Does nothing with other C libraries.
    """
    library = _glibc()
    if library is None:
        yield
        return
    _set(library, _KEEPING)
    try:
        yield
    finally:
        _set(library, _DEFAULTS)
        library.malloc_trim(0)


def return_freed_memory():
    """Return freed memory, of all threads, to the kernel. Does nothing with other C libraries."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def _glibc():
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "mallopt") else None


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


def available_memory(root="/"):
    """Bytes of memory that this process can still get: of the machine, and within its cgroups' limits; None if unknown.

    root: of the file system that /proc and /sys are in.
    """
    limits = []
    with suppress(OSError, ValueError, IndexError):
        (line,) = re.findall("^MemAvailable: +([0-9]+) kB$", Path(root, "proc/meminfo").read_text(), re.MULTILINE)
        limits.append(int(line) * 1024)
    with suppress(OSError):
        for line in Path(root, "proc/self/cgroup").read_text().splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers in ("", "memory"):
                limits += _free_in_cgroups(Path(root, "sys/fs/cgroup", controllers), group.strip("/"))
    return max(0, min(limits)) if limits else None


def _free_in_cgroups(folder, group):
    """Free bytes of a memory cgroup and of those that contain it, as far as they have limits: [int, ...].

    folder: of all cgroups of version 2, or of the controller "memory" of version 1. In a container the group itself is
    there.
    """
    names = ("memory.max", "memory.current", "inactive_file")
    if folder.name == "memory":
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    for each in (folder / group, *(folder / group).parents):
        with suppress(OSError, ValueError):
            limit, used = (int((each / name).read_text()) for name in names[:2])
            cached = dict(line.split() for line in (each / "memory.stat").read_text().splitlines())
            yield limit - used + int(cached.get(names[2], 0))
        if each == folder:
            break


def check_memory(input_size, batch_size, needed):
    """Raise InputError if `needed` bytes, for a batch of images of this size, are more than the available memory."""
    available = available_memory()
    if available is not None and needed > available:
        raise InputError(
            f"--input_size {input_size} with --batch_size {batch_size}: needs at least {needed / 1e9:,.1f} GB of "
            f"memory, and {available / 1e9:,.1f} GB are free; lower --batch_size or --input_size"
        )


@contextmanager
def limited_memory():
    """Within this block an allocation fails that the available memory does not suffice for; Linux only.

    Otherwise it would succeed, and the system would end this or another process once the memory is used.
    """
    available = available_memory()
    if sys.platform != "linux" or available is None:
        yield
        return
    import resource

    with open("/proc/self/statm") as file:
        used = int(file.read().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + available
    if any(limit != resource.RLIM_INFINITY and limit < wanted for limit in (soft, hard)):
        yield
        return
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
