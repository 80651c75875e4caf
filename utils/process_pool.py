"""The same work on many things: on all cores, with a progress bar."""

import os
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import Pipe

from tqdm import tqdm

from utils.cli import signals_blocked

CHUNKS_AHEAD = 4  # chunks for each worker that are worked on before the first of them is taken


def available_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function, things, title, workers=None, chunk=32, no_bar=None):
    """Yield function(thing) for each of `things`, in order, from `workers` worker processes (None: one for each core).

    With 0 workers this process does it. Otherwise they are at most AHEAD chunks each ahead of what is taken, and end at
    once when this process is interrupted, and also when it is killed and can do nothing more. no_bar: tqdm's `disable`.
    """
    bar = dict(desc=title, total=len(things), unit="image", leave=False, disable=no_bar)
    if workers == 0:
        yield from tqdm(map(function, things), **bar)
        return
    chunks = [things[start : start + chunk] for start in range(0, len(things), chunk)]
    workers = max(1, min(workers or available_cores(), len(chunks)))
    # Nothing is ever sent through this pipe. It closes when this process closes it or dies, and the workers watch that.
    watched, held = Pipe(duplex=False)
    with watched, held, ProcessPoolExecutor(workers, initializer=_start, initargs=(watched, held)) as pool:
        try:
            yield from tqdm(_in_order(pool, function, chunks, CHUNKS_AHEAD * workers), **bar)
        except BaseException:
            held.close()  # futures are not cancelled: in Python 3.11 the executor fails on those when its workers end
            raise


def _in_order(pool, function, chunks, ahead):
    """Yield the results of all chunks, at most `ahead` of which are worked on at a time."""
    futures = deque()
    for number, part in enumerate(chunks):
        with signals_blocked():  # so that a signal cannot reach a worker before _start has prepared it
            futures.append(pool.submit(_work, function, part))
        if number + 1 >= ahead:
            yield from futures.popleft().result()
    for future in futures:
        yield from future.result()


def _work(function, things):
    return [function(thing) for thing in things]


def _start(watched, held):
    """Prepare a worker: it ignores Ctrl-C, which its parent handles, and watches whether its parent is alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    held.close()
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()


def _end_with_parent(watched):
    watched.poll(None)  # returns once the pipe is closed
    os._exit(1)


@contextmanager
def thread_pool(count=None):
    """A ThreadPoolExecutor of `count` threads (None: one for each core) in which BLAS, OpenMP and torch use one thread.

    One thread a core, each computing alone, beats one job spread over all cores. Where the block raises, jobs that have
    not begun are cancelled and running jobs are not waited for.
    """
    import torch
    from threadpoolctl import threadpool_limits

    def use_one_thread():
        torch.set_num_threads(1)  # of the calling thread, and the default of later ones
        threadpool_limits(1)  # OpenMP counts its threads separately in each thread

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(count or available_cores(), initializer=use_one_thread)
    with threadpool_limits(1):
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        else:
            pool.shutdown()
        finally:
            torch.set_num_threads(threads)
