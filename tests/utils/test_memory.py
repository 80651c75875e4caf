"""Freed memory is kept while tensors are computed, and given back afterwards."""

import os
import resource
import sys

import pytest
import torch

from utils.memory import keep_freed_memory

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="needs the C library of Linux"
)
LARGE = 24 << 20  # float32 values: 96 MiB, more than the C library keeps by itself


def faults_of(times):
    """New pages that this process asks the system for while a large tensor is made and freed some times."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(LARGE).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident():
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_large_tensors_are_made_of_the_same_memory_and_it_is_given_back():
    with keep_freed_memory():
        once, _, many = faults_of(1), faults_of(20), faults_of(20)  # small things lie in the way of the first ones
        held = resident()
    assert many < once
    assert held - resident() > 3 * LARGE  # of 4 bytes each


def test_an_error_within_goes_out_and_memory_is_given_back():
    with pytest.raises(ZeroDivisionError), keep_freed_memory():
        faults_of(1)
        held = resident()
        raise ZeroDivisionError
    assert held - resident() > 3 * LARGE
