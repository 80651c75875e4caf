import os
import subprocess
import sys
from pathlib import Path

import pytest

from utils.numpy_sort import is_avx512_sort_slow

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("processor", "slowly"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC", True),
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 26\nmodel\t\t: 2", False),
        ("processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143", False),
        ("AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD", True),
        ("Intel64 Family 6 Model 151 Stepping 2, GenuineIntel", False),
        ("arm", False),
    ],
)
def test_processors_on_which_numpy_sorts_slowly(processor, slowly):
    assert is_avx512_sort_slow(processor) == slowly


def test_numpy_is_told_before_it_is_imported():
    code = (
        "import os; from utils.numpy_sort import choose_sort_kernel, is_avx512_sort_slow, processor_name; "
        "choose_sort_kernel(); "
        "print(is_avx512_sort_slow(processor_name()), os.environ.get('NPY_DISABLE_CPU_FEATURES'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NPY_DISABLE_CPU_FEATURES"}
    for given, start in ((None, ""), ("FMA4", ""), (None, "import numpy; ")):
        own = environment | ({"NPY_DISABLE_CPU_FEATURES": given} if given else {})
        command = [sys.executable, "-c", start + code]
        slowly, value = subprocess.run(command, env=own, cwd=ROOT, capture_output=True, text=True).stdout.split(" ", 1)
        told = slowly == "True" and not given and not start
        assert value.strip() == (given or ("X86_V4 AVX512_SKX" if told else "None"))
