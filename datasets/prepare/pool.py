"""The same work on many things: on all cores, with a progress bar."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import Pipe

from tqdm import tqdm

from datasets.errors import signals_wait


def on_all_cores(function, things, title, workers=None, chunk=32):
    """Yield function(thing) for each of `things`, in order, from `workers` worker processes (None: one for each core).

    The workers end at once when this process is interrupted, and also when it is killed and can do nothing more.
    """
    chunks = [things[start : start + chunk] for start in range(0, len(things), chunk)]
    # Nothing is ever sent through this pipe. It closes when this process closes it or dies, and the workers watch that.
    watched, held = Pipe(duplex=False)
    with watched, held, ProcessPoolExecutor(workers, initializer=_start, initargs=(watched, held)) as pool:
        try:
            with signals_wait():  # so that a signal cannot reach a worker before _start has prepared it
                futures = [pool.submit(_work, function, part) for part in chunks]
            results = (result for future in futures for result in future.result())
            yield from tqdm(results, title, total=len(things), unit="image", leave=False, disable=None)
        except BaseException:
            held.close()  # futures are not cancelled: in Python 3.11 the executor fails on those when its workers end
            raise


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
