"""Codebooks of one-to-many matching: the component means of a Gaussian mixture in each sub-space of the gallery."""

import warnings
from concurrent.futures import as_completed

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from tqdm import tqdm

from models import parallel
from models.eval.mixture import CollapsedComponent, fit_mixture
from models.eval.workers import workers
from models.parallel import note


def fit_codebooks(gallery, grid, seed=123, mixture="torch", device="cpu"):
    """Fit the codebooks of a grid of (M, K). Processes share the rows; each fits as many at a time as it has cores.

    gallery, seed, mixture, device: as in `fit_codebook`. Rows that did not converge are printed.
    Returns ({(M, K): codebook (M, K, D/M)}, {(M, K): why it could not be fitted}), in all processes.
    """
    # Many sub-spaces take longest, as EM needs more iterations in narrow ones, and come first.
    own, fitted = sorted(grid, reverse=True)[parallel.rank() :: parallel.processes()], {}
    with (
        workers() as pool,
        tqdm(total=len(own), desc="mixtures", unit="row", leave=False, disable=parallel.bar()) as progress,
    ):
        jobs = {key: pool.submit(fit_codebook, gallery, *key, seed, mixture, device) for key in own}
        for _ in as_completed(jobs.values()):
            progress.update()
    for key, job in jobs.items():
        try:
            fitted[key] = job.result()
        except CollapsedComponent as error:
            fitted[key] = str(error)
    fitted = parallel.merged(fitted)
    codebooks, failures = {}, {}
    for key in grid:
        row = f"M {key[0]}, K {key[1]}, seed {seed}"
        if isinstance(fitted[key], str):
            failures[key] = fitted[key]
            note(f"note: {row}: {fitted[key]}; the row is left out, others are not affected")
            continue
        codebooks[key], unconverged = fitted[key]
        if unconverged:
            note(f"note: {row}: no convergence in 100 iterations in sub-space {unconverged}")
    return codebooks, failures


def fit_codebook(gallery, subspaces, clusters, seed=123, mixture="torch", device="cpu"):
    """Fit a full-covariance mixture of `clusters` components to each of `subspaces` equal parts of the gallery.

    gallery: (N, D) float32 array, D divisible by `subspaces`. The sub-spaces draw their k-means starts from one random
    stream, one after the other, as in the release; scikit-learn 1.3 changed what that stream gives.
    mixture: "torch" for our EM (float64, on `device`), "sklearn" for scikit-learn's in the gallery's dtype, as in the
    release. Both start from the same k-means, with tolerance 1e-3, at most 100 iterations and 1e-6 on the diagonal.
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
