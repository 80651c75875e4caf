"""Freed memory is kept while tensors are computed, and given back afterwards."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs the C library of Linux"
)
LARGE = 24 << 20  # float32 values: 96 MiB, more than the C library keeps by itself

# In a process of its own: an allocation that failed in another test may have moved the thread to an arena of glibc that
# is limited to 64 MiB.
SCRIPT = """
import json, os, resource, sys
import torch
from utils.memory import keep_freed_memory

def faults_of(times):  # new pages that this process asks the system for
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(int(sys.argv[1])).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

result = {}
with keep_freed_memory():
    result["once"], _, result["many"] = faults_of(1), faults_of(20), faults_of(20)  # small things lie in the way
    held = resident()
result["given_back"] = held - resident()
try:
    with keep_freed_memory():
        faults_of(1)
        held = resident()
        raise ZeroDivisionError
except ZeroDivisionError:
    result["given_back_after_error"] = held - resident()
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def result():
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(LARGE)], capture_output=True, text=True, check=True, timeout=300
    )
    return json.loads(ended.stdout)


def test_large_tensors_are_made_of_the_same_memory_and_it_is_given_back(result):
    assert result["many"] < result["once"]
    assert result["given_back"] > 3 * LARGE  # of 4 bytes each


def test_an_error_within_goes_out_and_memory_is_given_back(result):
    assert result["given_back_after_error"] > 3 * LARGE
