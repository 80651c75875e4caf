"""k-means, and mixtures as the release fits them: by scikit-learn, without PyTorch."""

import warnings
from contextlib import contextmanager

import numpy as np
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from threadpoolctl import threadpool_limits

from models.eval.parts import CollapsedComponent, check_parts, joined, parts_of


def fit_codebook(gallery, subspaces, clusters, seed=123):
    """What models.eval.codebooks.fit_codebook gives with mixture "sklearn"."""
    check_parts(gallery, subspaces, clusters)
    # On a busy machine, threads that wait for each other in each of many small products take ten times as long.
    with threadpool_limits(1), without_warnings():
        return fit_row(gallery, (subspaces, clusters), seed)


def fit_row(gallery, row, seed, done=None):
    """(codebook, sub-spaces that did not converge) of a row (M, K), in the gallery's dtype; done: see parts.joined."""
    (subspaces, clusters), random = row, np.random.RandomState(seed)
    return joined((_fit(part, clusters, random) for part in parts_of(gallery, subspaces)), gallery.dtype, done)


def starts(gallery, row, seed):
    """Yield the k-means cluster (N,) of each photo in each sub-space."""
    (subspaces, clusters), random = row, np.random.RandomState(seed)
    for part in parts_of(gallery, subspaces):
        yield KMeans(clusters, n_init=1, random_state=random).fit(part).labels_


@contextmanager
def without_warnings():
    """Within this block, in all threads, scikit-learn does not say that photos repeat or that a mixture moves still."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


def _fit(part, clusters, random):
    try:
        fitted = GaussianMixture(clusters, covariance_type="full", random_state=random).fit(part)
    except ValueError as error:
        if "ill-defined" not in str(error):
            raise
        raise CollapsedComponent("a component collapsed onto too few photos") from None
    return fitted.means_, fitted.converged_
