"""The same work on many things, on all cores, with a progress bar."""

import signal
from concurrent.futures import ProcessPoolExecutor

from tqdm import tqdm


def on_all_cores(function, things, title, workers=None, chunk=32):
    """Yield function(thing) for each of `things`, in order, from `workers` processes (None: one a core).

    The processes leave Ctrl-C to this one, which drops what they have not begun.
    """
    with ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        try:
            results = pool.map(function, things, chunksize=chunk)
            yield from tqdm(results, title, total=len(things), unit="image", leave=False, disable=None)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
