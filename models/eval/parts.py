"""A codebook is fitted part by part: what every way of fitting it shares. Stands alone, on NumPy."""

import numpy as np


class CollapsedComponent(ValueError):
    """The covariance of a component is not positive definite, so the mixture cannot be fitted."""


def check_parts(gallery, subspaces, clusters):
    """Raise ValueError if there are fewer photos than clusters, or features cannot be cut into equal parts."""
    count, width = gallery.shape
    if clusters > count:
        raise ValueError(f"{clusters} clusters need as many gallery photos, there are {count}")
    if width % subspaces:
        raise ValueError(f"{width}-dimensional features cannot be cut into {subspaces} equal sub-spaces")


def parts_of(gallery, subspaces):
    """The parts (N, D/M) of features (N, D), one after the other."""
    return map(np.ascontiguousarray, np.split(gallery, subspaces, axis=1))


def joined(fits, dtype, done=None):
    """(codebook (M, K, D/M), sub-spaces that did not converge) of (means, whether it converged) of each sub-space.

    done: is called after each sub-space. Raises CollapsedComponent, naming the sub-space.
    """
    means, unconverged, index = [], [], 0
    try:
        for fitted, converged in fits:
            means.append(fitted)
            unconverged += [] if converged else [index]
            index += 1
            if done:
                done()
    except CollapsedComponent as error:
        raise CollapsedComponent(f"sub-space {index}: {error}") from None
    return np.stack(means).astype(dtype), unconverged
