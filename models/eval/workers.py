"""Independent jobs side by side: one thread a core, each computing alone, beats one job spread over all cores."""

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits


@contextmanager
def workers(count=None):
    """A ThreadPoolExecutor of `count` threads (None: one a core); BLAS, OpenMP and torch use one thread in each."""
    count = count or available_cores()
    threads = torch.get_num_threads()
    with threadpool_limits(1), ThreadPoolExecutor(count, initializer=_compute_alone) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        finally:
            torch.set_num_threads(threads)


def available_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compute_alone():
    torch.set_num_threads(1)  # of the calling thread, and the default of later ones
    threadpool_limits(1)  # OpenMP counts its threads separately in each thread
