"""Codebooks of one-to-many matching: the component means of a Gaussian mixture in each sub-space of the gallery."""

import functools
import threading
import time
from concurrent.futures import as_completed

import torch
from tqdm import tqdm

from models.eval.gmm import fit_mixture
from models.eval.parts import CollapsedComponent, check_parts, joined, parts_of
from models.eval.sklearn_mixture import fit_row, starts, without_warnings
from models.eval.workers import workers
from utils import distributed
from utils.distributed import bar_disabled, log_rank0
from utils.process_pool import available_cores

SILENCE, PATIENCE = 10, 120  # seconds
CPU_ADVANTAGE = 8  # our EM on a CPU computes about an eighth of what it computes on a GPU


def fit_codebooks(gallery, grid, seed=123, mixture="torch", device="cpu"):
    """Fit the codebooks of a grid of (M, K). Processes share the rows; each fits as many at a time as it has cores.

    gallery, seed, mixture, device: as in `fit_codebook`. Only k-means runs side by side if `device` is a GPU, which
    then takes the rows one after the other. Rows that did not converge are printed.
    Returns ({(M, K): codebook (M, K, D/M)}, {(M, K): why it could not be fitted}), in all processes.
    """
    # Many sub-spaces take longest, as EM needs more iterations in narrow ones, and come first.
    own, fitted = sorted(grid, reverse=True)[distributed.get_rank() :: distributed.get_world_size()], {}
    on_gpu = mixture == "torch" and torch.device(device).type != "cpu"
    at_a_time = 1 if on_gpu else min(len(own), available_cores())
    progress = _Progress(sum(subspaces for subspaces, _ in own), at_a_time)
    with without_warnings(), workers() as pool, progress:
        if on_gpu:
            jobs = {pool.submit(_all_starts, gallery, row, seed): row for row in own}
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
    """Fit a full-covariance mixture of `clusters` components to each of `subspaces` equal parts of the gallery.

    gallery: (N, D) float32 array, D divisible by `subspaces`. The sub-spaces draw their k-means starts from one random
    stream, one after the other, as in the release; scikit-learn 1.3 changed what that stream gives.
    mixture: "torch" for our EM (float64, on `device`), "sklearn" for scikit-learn's in the gallery's dtype, as in the
    release. Both start from the same k-means, with tolerance 1e-3, at most 100 iterations and 1e-6 on the diagonal.
    Returns (codebook (M, K, D/M) in the gallery's dtype, sub-spaces whose mixture did not converge).
    Raises ValueError if there are fewer photos than clusters or D is not divisible, and CollapsedComponent, naming the
    sub-space, where a mixture cannot be fitted.
    """
    check_parts(gallery, subspaces, clusters)
    with without_warnings():
        return _fit_row(gallery, (subspaces, clusters), seed, mixture, device)


def _fit_row(gallery, row, seed, mixture, device="cpu", done=None):
    """fit_codebook without its checks; done: see parts.joined."""
    if mixture == "torch":
        return _fit_from(gallery, row, starts(gallery, row, seed), device, done)
    return fit_row(gallery, row, seed, done)


def _all_starts(gallery, row, seed):
    return list(starts(gallery, row, seed))


def _fit_from(gallery, row, labels, device, done=None):
    """What fit_codebook returns, from the k-means clusters in each sub-space; done: see parts.joined."""
    subspaces, clusters = row
    parts = zip(parts_of(gallery, subspaces), labels, strict=True)
    return joined((_fit_torch(part, start, clusters, device) for part, start in parts), gallery.dtype, done)


def _fit_torch(part, start, clusters, device):
    fitted = fit_mixture(torch.from_numpy(part).to(device), torch.from_numpy(start), clusters)
    return fitted.means.cpu().numpy(), fitted.converged


@functools.cache
def mixture_device(device):
    """Where mixtures are fitted fastest: on `device`, or on the CPU where that GPU is slow in float64, as most are.

    Found out by timing a product once; see CPU_ADVANTAGE.
    """
    if torch.device(device).type == "cpu":
        return device
    seconds = {each: _seconds_of_a_product(each) for each in ("cpu", device)}
    return device if seconds[device] * CPU_ADVANTAGE < seconds["cpu"] else "cpu"


def _seconds_of_a_product(device, size=1024):
    """Seconds of a float64 product of size³, the best of three."""
    matrix, times = torch.rand(size, size, dtype=torch.float64, device=device), []
    for _ in range(4):  # the first one warms up
        began = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        times.append(time.perf_counter() - began)
    return min(times[1:])


class _Progress:
    """The bar of the mixtures. Where there is none, it is said how far they are and how long they take, each once."""

    def __init__(self, total, at_a_time):
        self.total, self.count, self.began, self.told = total, 0, time.monotonic(), False
        self.enough = max(4, 2 * at_a_time)  # the first few of several that run side by side would tell too much
        self.timer = threading.Timer(SILENCE, self._say_how_far)
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
        """One mixture is fitted. Called by several threads."""
        self.bar.update()
        self.count += 1
        seconds = (time.monotonic() - self.began) * (self.total / self.count - 1)
        if self.bar.disable and self.count >= self.enough and not self.told and seconds > PATIENCE:
            self.told = True
            log_rank0(f"note: the other {self.total - self.count} mixtures take about {seconds / 60:.0f} minutes")

    def _say_how_far(self):
        if not self.told:
            log_rank0(f"note: {self.count} of {self.total} mixtures are fitted after {SILENCE} seconds")
