"""Codebooks of one-to-many matching: the component means of a Gaussian mixture in each sub-space of the gallery."""

import warnings

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

from models.eval.mixture import CollapsedComponent, fit_mixture


def fit_codebook(gallery, subspaces, clusters, seed=123, mixture="torch", device="cpu"):
    """Fit a full-covariance mixture of `clusters` components to each of `subspaces` equal parts of the gallery.

    gallery: (N, D) float32 array, D divisible by `subspaces`. The sub-spaces draw their k-means starts from one random
    stream, one after the other, as in the release; scikit-learn 1.3 changed what that stream gives.
    mixture: "torch" for our EM (float64, on `device`), "sklearn" for scikit-learn's in the gallery's dtype, as in the
    release. Both go on from the same start: tolerance 1e-3, at most 100 iterations, 1e-6 on the diagonal.
    Returns (codebook (M, K, D/M) in the gallery's dtype, sub-spaces whose mixture did not converge).
    Raises ValueError if there are fewer photos than clusters or D is not divisible, and CollapsedComponent, naming the
    sub-space, where a mixture cannot be fitted.
    """
    count, width = gallery.shape
    if clusters > count:
        raise ValueError(f"{clusters} clusters need as many gallery photos, there are {count}")
    if width % subspaces:
        raise ValueError(f"{width}-dimensional features cannot be cut into {subspaces} equal sub-spaces")
    fit = {"torch": _fit_torch, "sklearn": _fit_sklearn}[mixture]
    random = np.random.RandomState(seed)
    means, unconverged = [], []
    for index, part in enumerate(np.split(gallery, subspaces, axis=1)):
        try:
            fitted, converged = fit(np.ascontiguousarray(part), clusters, random, device)
        except CollapsedComponent as error:
            raise CollapsedComponent(f"sub-space {index}: {error}") from None
        means.append(fitted)
        if not converged:
            unconverged.append(index)
    return np.stack(means).astype(gallery.dtype), unconverged


def _fit_torch(part, clusters, random, device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct photos than clusters
        start = KMeans(clusters, n_init=1, random_state=random).fit(part).labels_
    fitted = fit_mixture(torch.from_numpy(part).to(device), torch.from_numpy(start), clusters)
    return fitted.means.cpu().numpy(), fitted.converged


def _fit_sklearn(part, clusters, random, _):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        try:
            fitted = GaussianMixture(clusters, covariance_type="full", random_state=random).fit(part)
        except ValueError as error:
            if "ill-defined" not in str(error):
                raise
            raise CollapsedComponent("a component collapsed onto too few photos") from None
    return fitted.means_, fitted.converged_
