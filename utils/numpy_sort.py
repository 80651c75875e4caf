"""Choice of NumPy's sort kernel: AVX-512 is slower than AVX2 on some processors, and matching is mostly sorting."""

import os
import platform
import re
import sys


def choose_sort_kernel():
    """Disable AVX-512 in NumPy if AVX2 sorts faster. Call it before NumPy is imported: NumPy reads the variable then.

    A value that the user has set in the environment stays.
    """
    if "numpy" not in sys.modules and is_avx512_sort_slow(processor_name()):
        # The names of NumPy 2.4 and of earlier versions; NumPy ignores the one it does not know.
        os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_SKX")


def is_avx512_sort_slow(processor):
    """Whether NumPy's AVX-512 sort is four times slower than its AVX2 sort: on AMD's Zen 4 (family 25).

    processor: the start of Linux's /proc/cpuinfo, or platform.processor() elsewhere.
    """
    return bool(re.search(r"AuthenticAMD\s+cpu family\s*: 25\b|AMD64 Family 25\b", processor))


def processor_name():
    """Text that names the processor, for `is_avx512_sort_slow`."""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(200)
    except OSError:
        return platform.processor()
