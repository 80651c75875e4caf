"""SBKA itself: networks, alignment, training and the zero-shot test."""

import os
import platform
import re
import sys


def _sorts_slowly(processor):
    """Whether NumPy's AVX-512 sort takes four times as long as its AVX2 one there: AMD's Zen 4 (family 25).

    processor: the start of Linux's /proc/cpuinfo, or platform.processor() elsewhere.
    """
    return bool(re.search(r"AuthenticAMD\s+cpu family\s*: 25\b|AMD64 Family 25\b", processor))


def _about_processor():
    try:
        with open("/proc/cpuinfo") as file:
            return file.read(200)
    except OSError:
        return platform.processor()


# Matching is mostly sorting, and NumPy reads this once, as it is imported: nowhere else would do. The names are those
# of NumPy 2.4 and of earlier ones; what NumPy does not know it leaves alone.
if "numpy" not in sys.modules and _sorts_slowly(_about_processor()):
    os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_SKX")
