"""Freed memory is kept while tensors are computed, and given back afterwards."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from utils import memory

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


def machine(root, available, groups, files=()):
    """A root with /proc and /sys of a machine with memory cgroups."""
    files = {f"sys/fs/cgroup/{name}": content for name, content in dict(files).items()}
    files |= {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:   {available} kB\n", "proc/self/cgroup": groups}
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


def test_available_memory_is_the_least_that_machine_and_cgroups_leave(tmp_path):
    assert memory.available_memory(tmp_path) is None
    assert memory.available_memory(machine(tmp_path / "plain", 7, "0::/\n")) == 7 * 1024
    version_2 = {"user/memory.max": "9000", "user/memory.current": "8000", "user/memory.stat": "inactive_file 500\n",
                 "user/own/memory.max": "max", "user/own/memory.current": "1"}  # fmt: skip
    assert memory.available_memory(machine(tmp_path / "two", 7, "0::/user/own\n", version_2)) == 1500
    version_1 = {"memory/memory.limit_in_bytes": "5000", "memory/memory.usage_in_bytes": "4500",
                 "memory/memory.stat": "total_inactive_file 100\n"}  # fmt: skip
    assert memory.available_memory(machine(tmp_path / "one", 7, "3:cpu:/x\n4:memory:/docker/x\n", version_1)) == 600
    full = version_1 | {"memory/memory.usage_in_bytes": "9000"}
    assert memory.available_memory(machine(tmp_path / "full", 7, "4:memory:/\n", full)) == 0


def test_more_than_the_available_memory_is_not_allocated(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 1 << 30)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with memory.limited_memory():
        np.empty(1 << 28, np.uint8)
        with pytest.raises(MemoryError):
            np.empty(1 << 31, np.uint8)
    np.empty(1 << 31, np.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    with memory.limited_memory():
        np.empty(1 << 31, np.uint8)
