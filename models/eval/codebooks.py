"""Codebooks of one-to-many matching: the component means of a Gaussian mixture in each sub-space of the gallery."""

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture


def fit_codebook(gallery, subspaces, clusters, seed=123):
    """Fit a full-covariance mixture of `clusters` components to each of `subspaces` equal parts of the gallery.

    gallery: (N, D) float32 array, D divisible by `subspaces`. scikit-learn's defaults, in the input's dtype, as in the
    release: k-means start, tolerance 1e-3, 1e-6 on the diagonal, at most 100 iterations; the sub-spaces draw from one
    random stream, one after the other. scikit-learn 1.3 changed what that stream gives.
    Returns (codebook (M, K, D/M) in the gallery's dtype, sub-spaces whose mixture did not converge).
    Raises ValueError if there are fewer photos than clusters or D is not divisible.
    """
    count, width = gallery.shape
    if clusters > count:
        raise ValueError(f"{clusters} clusters need as many gallery photos, there are {count}")
    if width % subspaces:
        raise ValueError(f"{width}-dimensional features cannot be cut into {subspaces} equal sub-spaces")
    random = np.random.RandomState(seed)
    means, unconverged = [], []
    for index, part in enumerate(np.split(gallery, subspaces, axis=1)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture = GaussianMixture(clusters, covariance_type="full", random_state=random).fit(part)
        if not mixture.converged_:
            unconverged.append(index)
        means.append(mixture.means_)
    return np.stack(means).astype(gallery.dtype), unconverged
