"""Bounds of memory and time for a process that reads damaged files, one after the other."""

import faulthandler
import signal
from pathlib import Path


def crash_with_traceback():
    """From now on a crash, and the end of the time of `limit_time`, prints where this process was."""
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # then the signal ends the process


def limit_time(seconds=0):
    """End this process after that many seconds of its CPU time; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def limit_memory(extra_bytes):
    """Allow this process so many bytes of address space on top of what it has now, where the system tells that."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        limit = int(statm.read_text().split()[0]) * resource.getpagesize() + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
