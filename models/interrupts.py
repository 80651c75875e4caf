"""Ctrl-C and SIGTERM while a network trains: the first one ends the run after its step, the second one at once."""

import signal
from contextlib import contextmanager

from utils.distributed import log_rank0


@contextmanager
def caught():
    """Give a list. The first SIGINT or SIGTERM within this block only adds its number to it; a second acts as usual."""
    signals, usual = [], {}

    def take(number, _):
        signals.append(number)
        signal.signal(number, usual[number])
        log_rank0("note: ending after this step, with a checkpoint; once more ends at once")

    for number in (signal.SIGINT, signal.SIGTERM):
        usual[number] = signal.signal(number, take)
    try:
        yield signals
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


def status(signals):
    """Exit status of a process that ends for the first of `signals`, or because another process was sent one."""
    return 128 + (signals[0] if signals else signal.SIGTERM)


def leave_workers_alone():
    """Let the death of a process that decodes images be noticed when its next batch is wanted.

    torch's own handler would raise at once, which may be in the middle of a step. It is set when a loader starts its
    workers, so call this after that.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
