"""Codebooks of one-to-many matching: the component means of a Gaussian mixture in each sub-space of the gallery.

The mixture is scikit-learn's: full covariances, k-means start, tolerance 1e-3 on the mean log-likelihood, 1e-6 on the
diagonal, at most 100 iterations. Ours runs in float64 on any device and leaves out only what rounds to nothing.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

TOLERANCE, REGULARISATION, ITERATIONS = 1e-3, 1e-6, 100
# A component whose log-probability is this far below the best of a photo has a responsibility below e^-100. A
# component's total is at least 10 eps = 2e-15, so e^-100 = 4e-44 of N photos is far below the last bit of every sum.
NEGLIGIBLE = 100.0
BLOCK = 4096  # photos at a time: bounds the memory


class CollapsedComponent(ValueError):
    """A component's covariance is not positive definite, so its mixture cannot be fitted."""


@dataclass(frozen=True)
class Mixture:
    """A fitted mixture of K components in d dimensions, float64 on its device."""

    means: torch.Tensor  # (K, d)
    weights: torch.Tensor  # (K,)
    iterations: int
    converged: bool
    lower_bound: float  # mean log-likelihood of the last iteration, before its M step


def fit_codebook(gallery, subspaces, clusters, seed=123, mixture="torch", device="cpu"):
    """Fit a mixture of `clusters` components to each of `subspaces` equal parts of the gallery.

    gallery: (N, D) float32 array, D divisible by `subspaces`. The sub-spaces draw their k-means starts from one random
    stream, one after the other, as in the release; scikit-learn 1.3 changed what that stream gives.
    mixture: "torch" for `fit_mixture` (float64, on `device`), "sklearn" for scikit-learn in the gallery's dtype, as in
    the release. Both start from the same k-means.
    Returns (codebook (M, K, D/M) in the gallery's dtype, sub-spaces whose mixture did not converge).
    Raises ValueError if there are fewer photos than clusters or D is not divisible, CollapsedComponent (naming the
    sub-space) if a mixture cannot be fitted.
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
            try:
                fitted, converged = _fit_part(part, clusters, random, mixture, device)
            except CollapsedComponent as error:
                raise CollapsedComponent(f"sub-space {index}: {error}") from None
        means.append(fitted)
        if not converged:
            unconverged.append(index)
    return np.stack(means).astype(gallery.dtype), unconverged


def _fit_part(part, clusters, random, mixture, device):
    if mixture == "sklearn":
        try:
            fitted = GaussianMixture(clusters, covariance_type="full", random_state=random).fit(part)
        except ValueError as error:
            if "ill-defined" not in str(error):
                raise
            raise CollapsedComponent("a component collapsed onto too few photos") from None
        return fitted.means_, fitted.converged_
    start = KMeans(clusters, n_init=1, random_state=random).fit(part).labels_
    fitted = fit_mixture(torch.from_numpy(part).to(device), torch.from_numpy(start), clusters)
    return fitted.means.cpu().numpy(), fitted.converged


@torch.inference_mode()
def fit_mixture(points, start, clusters):
    """Fit a full-covariance Gaussian mixture by EM in float64, on the device of `points`.

    points: (N, d) floating; start: (N,) component of each point to begin with, int. Returns a Mixture with the means,
    weights and iterations that scikit-learn's GaussianMixture has after the same start, to rounding.
    Raises CollapsedComponent, naming the component.
    """
    points = points.double()
    # A mixture turns with its points, and the regularisation does not notice. Turned onto their principal axes, the
    # first few dimensions show for most pairs of photo and component that their responsibility is negligible.
    axes = torch.linalg.eigh(torch.cov(points.T, correction=0).view(points.shape[1], -1)).eigenvectors.flip(1)
    points = points @ axes
    likeliest = start.long().to(points.device)
    responsibilities = torch.nn.functional.one_hot(likeliest, clusters).double()
    totals, means, roots = _maximise(points, responsibilities)
    weights = totals / len(points)
    bound = -torch.inf
    for iteration in range(1, ITERATIONS + 1):
        previous = bound
        joint = _log_probabilities(points, means, roots, weights.log(), likeliest)
        evidence = joint.logsumexp(dim=1)
        totals, means, roots = _maximise(points, (joint - evidence[:, None]).exp_())
        weights = totals / totals.sum()
        likeliest = joint.argmax(dim=1)
        bound = evidence.mean().item()
        if abs(bound - previous) < TOLERANCE:
            break
    return Mixture(means @ axes.T, weights, iteration, abs(bound - previous) < TOLERANCE, bound)


def _maximise(points, responsibilities):
    """M step: (totals (K,), means (K, d), inverse Cholesky roots of the covariances (K, d, d), lower-triangular)."""
    width = points.shape[1]
    totals = responsibilities.sum(dim=0) + 10 * torch.finfo(torch.float64).eps
    means = responsibilities.T @ points / totals[:, None]
    covariances = points.new_zeros(len(totals), width, width)
    for component, (mean, covariance) in enumerate(zip(means, covariances, strict=True)):
        share = responsibilities[:, component]
        for part in share.nonzero()[:, 0].split(BLOCK):
            offsets = points[part] - mean
            covariance.addmm_((offsets * share[part, None]).T, offsets)
        covariance /= totals[component]
        covariance.diagonal().add_(REGULARISATION)
    roots, failed = torch.linalg.cholesky_ex(covariances)
    if failed.any():
        raise CollapsedComponent(f"component {failed.nonzero()[0].item()} collapsed onto too few photos")
    identity = torch.eye(width, dtype=roots.dtype, device=roots.device).expand_as(roots)
    return totals, means, torch.linalg.solve_triangular(roots, identity, upper=False)


def _log_probabilities(points, means, roots, log_weights, likeliest):
    """E step: log of weight · density (N, K); -inf where a responsibility is negligible (see NEGLIGIBLE).

    roots: (K, d, d), lower-triangular, so the first q values of root · (point − mean) need only the first q of the
    point, and their squares bound the distance from below. likeliest: (N,) is each point's component in the last
    iteration, whose full value comes first: what is bounded far below it need not be computed.
    """
    count, width = points.shape
    constants = log_weights + roots.diagonal(dim1=1, dim2=2).log().sum(dim=1) - width / 2 * np.log(2 * np.pi)
    joint = points.new_full((count, len(means)), -torch.inf)
    best = points.new_empty(count)
    steps = _steps(width, points.device)
    for own in (True, False):
        for component in range(len(means)):
            chosen = (likeliest == component) == own
            for part in chosen.nonzero()[:, 0].split(BLOCK):
                squares = points.new_zeros(len(part))
                for start, stop in zip([0, *steps], steps, strict=False):
                    offsets = points[part, :stop] - means[component, :stop]
                    squares += (offsets @ roots[component, start:stop, :stop].T).square_().sum(dim=1)
                    value = constants[component] - squares / 2
                    if not own:
                        kept = value > best[part] - NEGLIGIBLE
                        part, squares, value = part[kept], squares[kept], value[kept]
                joint[part, component] = value
                best[part] = value if own else torch.maximum(best[part], value)
    return joint


def _steps(width, device):
    """Dimensions after which pairs of photo and component are looked over; a GPU multiplies faster than it looks."""
    return [width] if device.type == "cuda" else [*range(32, width, 96), width]
