"""Parallel map over worker processes, with a progress bar; calls of bounded time."""

import atexit
import os
import signal
import sys
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress

from utils.cli import signals_blocked

GRACE_S = 5  # for a call to end after it was asked to
CHUNKS_AHEAD = 4  # chunks per worker that are computed before the first of them is consumed


def available_cores():
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallel_map(function, items, title, workers=None, chunk=32, no_bar=None):
    """Yield function(item) for each of `items`, in order, from `workers` worker processes (None: one for each core).

    With 0 workers this process computes them. Otherwise at most CHUNKS_AHEAD chunks per worker are computed ahead of
    the consumer, and the workers exit at once when this process is interrupted or killed. no_bar: tqdm's `disable`.
    """
    from concurrent.futures import ProcessPoolExecutor  # these three take long, and `find` imports this module
    from multiprocessing import Pipe

    from tqdm import tqdm

    bar = dict(desc=title, total=len(items), unit="image", leave=False, disable=no_bar)
    if workers == 0:
        yield from tqdm(map(function, items), **bar)
        return
    chunks = [items[start : start + chunk] for start in range(0, len(items), chunk)]
    workers = max(1, min(workers or available_cores(), len(chunks)))
    # Nothing is sent through this pipe. It closes when this process closes it or dies, and the workers wait for that.
    reading, writing = Pipe(duplex=False)
    with reading, writing, ProcessPoolExecutor(workers, initializer=_start, initargs=(reading, writing)) as pool:
        try:
            yield from tqdm(_in_order(pool, function, chunks, CHUNKS_AHEAD * workers), **bar)
        except BaseException:
            writing.close()  # no future is cancelled: in Python 3.11 the executor fails on those when workers exit
            raise


def _in_order(pool, function, chunks, ahead):
    """Yield the results of all chunks, at most `ahead` of which are worked on at a time."""
    futures = deque()
    for number, chunk_items in enumerate(chunks):
        with signals_blocked():  # so that a signal cannot reach a worker before _start has prepared it
            futures.append(pool.submit(_work, function, chunk_items))
        if number + 1 >= ahead:
            yield from futures.popleft().result()
    for future in futures:
        yield from future.result()


def _work(function, items):
    return [function(item) for item in items]


def _start(reading, writing):
    """Prepare a worker: it ignores Ctrl-C, which its parent handles, and watches whether its parent is alive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    writing.close()
    threading.Thread(target=_end_with_parent, args=(reading,), daemon=True).start()


def _end_with_parent(reading):
    reading.poll(None)  # returns once the pipe is closed
    os._exit(1)


def call_with_timeout(function, seconds, stop=lambda: None):
    """function(), in a thread, as `map_with_timeout`."""
    return map_with_timeout(lambda _: function(), [None], seconds, stop)[0]


def map_with_timeout(function, items, seconds, stop=lambda: None):
    """[function(item) for each of `items`], each in a thread; Ctrl-C does not wait for them.

    stop: a function that asks them to end. Raises TimeoutError if one takes longer than `seconds`. It may then run on,
    and this process ends with status 2.
    """
    results = [Future() for _ in items]

    def run(result, item):
        try:
            result.set_result(function(item))
        except BaseException as error:
            result.set_exception(error)

    for pair in zip(results, items, strict=True):
        threading.Thread(target=run, args=pair, daemon=True).start()
    try:
        if wait(results, seconds).not_done:
            raise TimeoutError(f"it takes longer than {seconds} seconds")
    except BaseException:
        stop()
        if wait(results, GRACE_S).not_done:  # a library that is at work when the process ends can make it abort
            atexit.register(_end_at_once)
        raise
    return [result.result() for result in results]


def _end_at_once():
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(2)


@contextmanager
def thread_pool(count=None, threads=1):
    """A ThreadPoolExecutor of `count` threads (None: one for each core); in each BLAS, OpenMP and torch use `threads`.

    One thread a core, each computing alone, beats one job spread over all cores. Where the block raises, jobs that have
    not begun are cancelled and running jobs are not waited for.
    """
    import torch
    from threadpoolctl import threadpool_limits

    def limit():
        torch.set_num_threads(threads)  # of the calling thread, and the default of later ones
        threadpool_limits(threads)  # OpenMP counts its threads separately in each thread

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count or available_cores(), initializer=limit)
    with threadpool_limits(threads):
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        else:
            pool.shutdown()
        finally:
            torch.set_num_threads(before)
