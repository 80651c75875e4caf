"""Deterministic subsets: indices that are spread evenly over a sequence."""

import numpy as np


def evenly_spaced(count, most, midpoints=False):
    """Ascending indices (int64) of at most `most` of `count` items, evenly spaced.

    They run from the first item to the last one. midpoints: instead the middle item of each of `most` equal parts.

    >>> evenly_spaced(10, 2).tolist(), evenly_spaced(10, 2, midpoints=True).tolist()
    ([0, 9], [2, 7])
    """
    most = min(most, count)
    if midpoints:
        return np.arange(1, 2 * most, 2) * count // max(1, 2 * most)
    return np.linspace(0, count - 1, most).round().astype(np.int64)
