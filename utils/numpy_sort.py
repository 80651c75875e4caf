"""Which sort kernel NumPy takes: matching is mostly sorting, and AVX-512 is the slower one on some processors."""

import os
import platform
import re
import sys


def choose_sort_kernel():
    """Have NumPy sort with AVX2 where AVX-512 is slower. NumPy reads this once, when it is imported: call this before.

    A choice that the user made in the environment stays.
    """
    if "numpy" not in sys.modules and is_avx512_sort_slow(processor_name()):
        # The names of NumPy 2.4 and of earlier versions; NumPy ignores the one it does not know.
        os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_SKX")


def is_avx512_sort_slow(processor):
    """Whether NumPy's AVX-512 sort takes four times as long as its AVX2 sort: so on AMD's Zen 4 (family 25).

    processor: the start of Linux's /proc/cpuinfo, or platform.processor() elsewhere.
    """
    return bool(re.search(r"AuthenticAMD\s+cpu family\s*: 25\b|AMD64 Family 25\b", processor))


def processor_name():
    """Text that names the processor, for `is_slow_with_avx512`."""
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(200)
    except OSError:
        return platform.processor()
