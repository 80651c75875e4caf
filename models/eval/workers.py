"""Independent jobs side by side: one thread a core, each computing alone, beats one job spread over all cores."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from threadpoolctl import threadpool_limits

from utils.process_pool import available_cores


@contextmanager
def workers(count=None):
    """A ThreadPoolExecutor of `count` threads (None: one a core); BLAS, OpenMP and torch use one thread in each."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count or available_cores(), initializer=_compute_alone)
    with threadpool_limits(1):
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the user is told at once; jobs that run come to their end
            raise
        else:
            pool.shutdown()
        finally:
            torch.set_num_threads(threads)


def _compute_alone():
    torch.set_num_threads(1)  # of the calling thread, and the default of later ones
    threadpool_limits(1)  # OpenMP counts its threads separately in each thread
