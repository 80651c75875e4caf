"""Codebooks of one-to-many matching: the component means of a Gaussian mixture in each sub-space of the gallery.

The mixtures are fitted by models.eval.gmm (PyTorch) or by scikit-learn, as in the release. PyTorch and scikit-learn are
imported where they are used: with mixture="sklearn", `fit_codebook` works where PyTorch is not installed.
"""

import functools
import threading
import time
import warnings
from concurrent.futures import as_completed
from contextlib import contextmanager

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from utils import distributed
from utils.distributed import bar_disabled, log_rank0
from utils.memory import return_freed_memory
from utils.process_pool import available_cores, thread_pool

PROGRESS_AFTER_S = 10  # without a progress bar, progress is printed once after as many seconds
ETA_ABOVE_S = 120  # without a progress bar, the remaining time is printed once if it is longer
SCREENING_GAIN = 8  # on a CPU, models.eval.gmm computes about an eighth of what it computes on a GPU


class CollapsedComponent(ValueError):
    """The covariance of a component is not positive definite, so the mixture cannot be fitted."""


def fit_codebooks(gallery, grid, seed=123, mixture="torch", device="cpu"):
    """Fit the codebooks of a grid of (M, K). Ranks share the rows; each fits as many at a time as it has cores.

    gallery, seed, mixture, device: as in `fit_codebook`. If `device` is a GPU, k-means runs in parallel on the CPU, and
    the GPU fits one row after the other. Rows that did not converge are printed.
    Returns ({(M, K): codebook (M, K, D/M)}, {(M, K): why it could not be fitted}), on all ranks.
    """
    import torch

    # Rows of many sub-spaces take longest, since EM needs more iterations in narrow sub-spaces, and are started first.
    own, fitted = sorted(grid, reverse=True)[distributed.get_rank() :: distributed.get_world_size()], {}
    on_gpu = mixture == "torch" and torch.device(device).type != "cpu"
    parallel = 1 if on_gpu else min(len(own), available_cores())
    progress = _Progress(sum(subspaces for subspaces, _ in own), parallel)
    with _no_convergence_warnings(), thread_pool() as pool, progress:
        if on_gpu:
            jobs = {pool.submit(_all_kmeans_labels, gallery, row, seed): row for row in own}
        else:
            jobs = {pool.submit(_fit_row, gallery, row, seed, mixture, done=progress.add): row for row in own}
        for job in as_completed(jobs):
            row = jobs[job]
            try:
                result = job.result()
                fitted[row] = _fit_from(gallery, row, result, device, progress.add) if on_gpu else result
            except CollapsedComponent as error:
                fitted[row] = str(error)
    fitted = distributed.all_gather_dict(fitted)
    codebooks, failures = {}, {}
    for key in grid:
        row = f"M {key[0]}, K {key[1]}, seed {seed}"
        if isinstance(fitted[key], str):
            failures[key] = fitted[key]
            log_rank0(f"note: {row}: {fitted[key]}; the row is left out, others are not affected")
            continue
        codebooks[key], unconverged = fitted[key]
        if unconverged:
            log_rank0(f"note: {row}: no convergence in 100 iterations in sub-space {unconverged}")
    return codebooks, failures


def fit_codebook(gallery, subspaces, clusters, seed=123, mixture="torch", device="cpu"):
    """Fit a full-covariance mixture of `clusters` components in each of `subspaces` equal sub-spaces of the gallery.

    gallery: (N, D) float32 array, D divisible by `subspaces`. The sub-spaces draw their k-means starts from one random
    stream, one after the other, as in the release; scikit-learn 1.3 changed what that stream gives.
    mixture: "torch" for EM in float64 on `device`, "sklearn" for scikit-learn's EM on one CPU thread in the gallery's
    dtype, as in the release. Both start from the same k-means, with tolerance 1e-3, at most 100 iterations and 1e-6 on
    the diagonal.
    Returns (codebook (M, K, D/M) in the gallery's dtype, sub-spaces whose mixture did not converge).
    Raises ValueError if there are fewer photos than clusters or D is not divisible, and CollapsedComponent, naming the
    sub-space, where a mixture cannot be fitted.
    """
    count, width = gallery.shape
    if clusters > count:
        raise ValueError(f"{clusters} clusters need as many gallery photos, there are {count}")
    if width % subspaces:
        raise ValueError(f"{width}-dimensional features cannot be cut into {subspaces} equal sub-spaces")
    # On a busy machine, BLAS threads that wait for each other in many small products take ten times as long.
    with threadpool_limits(1 if mixture == "sklearn" else None), _no_convergence_warnings():
        return _fit_row(gallery, (subspaces, clusters), seed, mixture, device)


def _fit_row(gallery, row, seed, mixture, device="cpu", done=None):
    """`fit_codebook` without its checks; done: called after each sub-space."""
    if mixture == "torch":
        return _fit_from(gallery, row, _kmeans_labels(gallery, row, seed), device, done)
    clusters, random = row[1], np.random.RandomState(seed)
    fits = (_fit_sklearn(values, clusters, random) for values in _subspaces(gallery, row[0]))
    return _stack(fits, gallery.dtype, done)


def _fit_from(gallery, row, labels, device, done=None):
    """What `fit_codebook` returns, from the k-means labels of each sub-space; done: called after each sub-space."""
    subspaces, clusters = row
    starts = zip(np.split(gallery, subspaces, axis=1), labels, strict=True)
    return _stack((_fit_torch(values, start, clusters, device) for values, start in starts), gallery.dtype, done)


def _fit_torch(values, start, clusters, device):
    """(means, whether EM converged) of a sub-space `values` (N, d), from k-means labels `start` (N,)."""
    import torch

    from models.eval import gmm

    return_freed_memory()  # several fits share the memory, and each leaves blocks that the next one cannot use
    fitted = gmm.fit_mixture(torch.from_numpy(values).to(device), torch.from_numpy(start), clusters)
    return_freed_memory()
    return fitted.means.cpu().numpy(), fitted.converged


def _fit_sklearn(values, clusters, random):
    """(means, whether EM converged) of a sub-space `values` (N, d)."""
    from sklearn.mixture import GaussianMixture

    try:
        fitted = GaussianMixture(clusters, covariance_type="full", random_state=random).fit(values)
    except ValueError as error:
        if "ill-defined" not in str(error):
            raise
        raise CollapsedComponent("a component collapsed onto too few photos") from None
    return fitted.means_, fitted.converged_


def _kmeans_labels(gallery, row, seed):
    """An iterator over the sub-spaces: the k-means cluster (N,) of each photo."""
    from sklearn.cluster import KMeans

    (subspaces, clusters), random = row, np.random.RandomState(seed)

    def fit(values):
        return KMeans(clusters, n_init=1, random_state=random).fit(values).labels_

    return map(fit, _subspaces(gallery, subspaces))  # unlike a generator, it does not keep the values


def _all_kmeans_labels(gallery, row, seed):
    return list(_kmeans_labels(gallery, row, seed))


def _subspaces(gallery, count):
    """The sub-spaces (N, D/M) of features (N, D), one after the other."""
    return map(np.ascontiguousarray, np.split(gallery, count, axis=1))


def _stack(fits, dtype, done=None):
    """(codebook (M, K, D/M), sub-spaces that did not converge) of (means, whether EM converged) of each sub-space.

    done: called after each sub-space. Raises CollapsedComponent, naming the sub-space.
    """
    codebook, unconverged, index = [], [], 0
    try:
        for means, converged in fits:
            codebook.append(means)
            unconverged += [] if converged else [index]
            index += 1
            if done:
                done()
    except CollapsedComponent as error:
        raise CollapsedComponent(f"sub-space {index}: {error}") from None
    return np.stack(codebook).astype(dtype), unconverged


@contextmanager
def _no_convergence_warnings():
    """Within this block, in all threads, scikit-learn warns neither of repeated photos nor of mixtures that still move.

    Mixtures that did not converge are in what `fit_codebook` returns.
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


@functools.cache
def mixture_device(device):
    """The device that fits mixtures faster: `device`, or the CPU where that GPU is slow in float64, as most GPUs are.

    Decided by timing one matrix product on each, see SCREENING_GAIN.
    """
    import torch

    if torch.device(device).type == "cpu":
        return device
    seconds = {each: _time_matmul(each) for each in ("cpu", device)}
    return device if seconds[device] * SCREENING_GAIN < seconds["cpu"] else "cpu"


def _time_matmul(device, size=1024):
    """Seconds of a float64 product of (size, size) matrices, the best of three."""
    import torch

    matrix, times = torch.rand(size, size, dtype=torch.float64, device=device), []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - start)
    return min(times[1:])


class _Progress:
    """Progress bar over mixtures; without a terminal, prints progress once and the remaining time once."""

    def __init__(self, total, parallel):
        self.total, self.count, self.start, self.eta_printed = total, 0, time.monotonic(), False
        self.enough = max(4, 2 * parallel)  # fitted mixtures that an estimate needs, as several run in parallel
        self.timer = threading.Timer(PROGRESS_AFTER_S, self._print_progress)
        self.timer.daemon = True

    def __enter__(self):
        self.bar = tqdm(total=self.total, desc="mixtures", unit="mixture", leave=False, disable=bar_disabled())
        if self.bar.disable:
            self.timer.start()
        return self

    def __exit__(self, *_):
        self.timer.cancel()
        self.bar.close()

    def add(self):
        """Count one fitted mixture. Called by several threads."""
        self.bar.update()
        self.count += 1
        seconds = (time.monotonic() - self.start) * (self.total / self.count - 1)
        if self.bar.disable and self.count >= self.enough and not self.eta_printed and seconds > ETA_ABOVE_S:
            self.eta_printed = True
            log_rank0(f"note: the other {self.total - self.count} mixtures take about {seconds / 60:.0f} minutes")

    def _print_progress(self):
        if not self.eta_printed:
            log_rank0(f"note: {self.count} of {self.total} mixtures are fitted after {PROGRESS_AFTER_S} seconds")
