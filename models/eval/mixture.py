"""EM for Gaussian mixtures with full covariances: scikit-learn's GaussianMixture, several times as fast.

In hundreds of dimensions responsibilities are almost one-hot. Which of them are negligible is shown by lower bounds of
the Mahalanobis distance, so only the others are computed; what is left out is below the last bit of every sum.
Stands alone.
"""

from dataclasses import dataclass

import numpy as np
import torch

TOLERANCE, REGULARISATION, ITERATIONS = 1e-3, 1e-6, 100  # scikit-learn's defaults
# A component whose log-probability is this far below a point's best has a responsibility below e^-100 = 4e-44. As
# every component's total starts from 10 eps = 2e-15, N points of that do not reach the last bit of a sum.
NEGLIGIBLE = 50.0
BLOCK = 2048  # points at a time: bounds the memory, fits a cache


class CollapsedComponent(ValueError):
    """The covariance of a component is not positive definite, so the mixture cannot be fitted."""


@dataclass(frozen=True)
class Mixture:
    """K components in d dimensions, float64."""

    means: torch.Tensor  # (K, d)
    weights: torch.Tensor  # (K,)
    lower_bound: float  # mean log-likelihood in the last iteration, before its M step
    iterations: int
    converged: bool


@torch.inference_mode()
def fit_mixture(points, start, components):
    """Fit a full-covariance Gaussian mixture in float64, on the device of `points`.

    points: (N, d) floating; start: (N,) int, the component that each point starts in.
    Returns the Mixture that scikit-learn's GaussianMixture finds from the same start in float64, to rounding and in as
    many iterations. Raises CollapsedComponent, naming the component.
    """
    points = points.double()
    likeliest = start.to(points.device).long()
    responsibilities = torch.nn.functional.one_hot(likeliest, components).T.double()
    totals, means, roots = _maximise(points, responsibilities)
    weights = totals / len(points)
    screen, bound = _Screen(points, components), -torch.inf
    for iteration in range(1, ITERATIONS + 1):
        previous = bound
        joint = _log_joint(points, means, roots, weights.log(), likeliest, screen)
        evidence = joint.logsumexp(dim=0)
        likeliest = joint.argmax(dim=0)
        totals, means, roots = _maximise(points, (joint - evidence).exp_())
        weights = totals / totals.sum()
        bound = evidence.mean().item()
        converged = abs(bound - previous) < TOLERANCE
        if converged:
            break
    return Mixture(means, weights, bound, iteration, converged)


def _maximise(points, responsibilities):
    """M step: totals (K,), means (K, d) and inverse Cholesky roots of the covariances (K, d, d), lower-triangular."""
    totals = responsibilities.sum(dim=1) + 10 * torch.finfo(torch.float64).eps
    means = responsibilities @ points / totals[:, None]
    covariances = points.new_zeros(len(totals), points.shape[1], points.shape[1])
    for share, mean, covariance in zip(responsibilities, means, covariances, strict=True):
        for part in share.nonzero()[:, 0].split(BLOCK):
            offsets = (points[part] - mean) * share[part, None].sqrt()
            covariance.addmm_(offsets.T, offsets)
    covariances /= totals[:, None, None]
    covariances.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
    roots, failed = torch.linalg.cholesky_ex(covariances)
    if failed.any():
        raise CollapsedComponent(f"component {failed.nonzero()[0].item()} collapsed onto too few photos")
    identity = torch.eye(points.shape[1], dtype=points.dtype, device=points.device).expand_as(roots)
    return totals, means, torch.linalg.solve_triangular(roots, identity, upper=False)


def _log_joint(points, means, roots, log_weights, likeliest, screen):
    """E step: log of weight · density (K, N); -inf where the responsibility is negligible (see NEGLIGIBLE).

    likeliest: (N,) component of each point in the last iteration. Its value comes first and is exact: others that
    are bounded far below it are not computed.
    """
    constants = log_weights + roots.diagonal(dim1=1, dim2=2).log().sum(dim=1) - points.shape[1] / 2 * np.log(2 * np.pi)
    joint = points.new_full((len(means), len(points)), -torch.inf)

    def exactly(component, part):
        for rows in part.split(BLOCK):
            squares = ((points[rows] - means[component]) @ roots[component].T).square_().sum(dim=1)
            joint[component, rows] = constants[component] - squares / 2

    for component in range(len(means)):
        exactly(component, (likeliest == component).nonzero()[:, 0])
    best = joint.gather(0, likeliest[None])[0]
    # The squared distance that a component must stay below to matter.
    limits = 2 * (constants[:, None] - best + NEGLIGIBLE)
    limits[likeliest, torch.arange(len(points), device=points.device)] = -torch.inf
    for component, part in enumerate(screen.survivors(means, roots, limits)):
        exactly(component, part)
    return joint


class _Screen:
    """Tells which points may lie nearer to a component than a limit, from lower bounds in float32.

    The squared length of root · (point − mean) in any subspace bounds the squared Mahalanobis distance from below.
    For each component the subspace is that in which all points are farthest from it on average, the leading
    eigenvectors of root · E[(point − mean)(point − mean)ᵀ] · rootᵀ, nearly: one step of subspace iteration for
    each step of EM. Any subspace would do, a better one leaves fewer survivors.
    """

    def __init__(self, points, components):
        width = points.shape[1]
        self.points = points.float()
        self.length = points.norm(dim=1).max()
        self.moment, self.centre = points.T @ points / len(points), points.mean(dim=0)
        self.first, size = max(1, width // 12), max(1, width // 4)
        generator = torch.Generator().manual_seed(0)  # not the caller's randomness
        start = torch.randn(components, width, size, dtype=torch.float64, generator=generator)
        self.subspace = start.to(points.device)
        self.fresh = True

    def survivors(self, means, roots, limits):
        """For each component the points (indices) whose squared distance may be below limits (K, N)."""
        directions = self._directions(means, roots)
        count, width, size = directions.shape
        # Rounding in float32 cannot move a length by more than this (the usual bound of a product's error).
        slack = (width + 8) * 2**-24 * (self.length + means.norm(dim=1))
        narrow = directions[:, :, : self.first]
        allowed = _reach(limits, slack * narrow.norm(dim=(1, 2)))
        stacked = narrow.float().permute(1, 0, 2).reshape(width, -1)
        shift = torch.einsum("kd,kdq->kq", means, narrow).float().reshape(-1)
        near = torch.empty(limits.shape, dtype=torch.bool, device=limits.device)
        for rows, out, reach in zip(self.points.split(BLOCK), near.split(BLOCK, 1), allowed.split(BLOCK, 1), strict=True):
            lengths = (rows @ stacked).sub_(shift).square_().view(len(rows), count, -1).sum(dim=2)
            torch.lt(lengths.T, reach, out=out)
        wide, full = directions[:, :, self.first :], roots.mT
        for component in range(count):
            part = near[component].nonzero()[:, 0]
            offsets = self.points[part] - means[component].float()
            for product in (directions[component], full[component]):
                reach = _reach(limits[component, part], slack[component] * product.norm())
                kept = (offsets @ product.float()).square_().sum(dim=1) < reach
                part, offsets = part[kept], offsets[kept]
            yield part

    def _directions(self, means, roots):
        """Orthonormal directions after the roots, the farthest first: (K, d, q)."""
        outer = means[:, :, None] * self.centre
        moments = self.moment - outer - outer.mT + means[:, :, None] * means[:, None, :]
        for _ in range(2 if self.fresh else 1):
            basis = torch.linalg.qr(self.subspace).Q
            image = roots @ (moments @ (roots.mT @ basis))
            self.subspace = image
        self.fresh = False
        turn = torch.linalg.eigh(basis.mT @ image).eigenvectors.flip(2)
        self.subspace = image @ turn
        return roots.mT @ (basis @ turn)


def _reach(limits, slack):
    """Squared length in float32 that a point within a squared distance of `limits` cannot exceed, for all rounding."""
    return ((limits.clamp(min=0).sqrt() + slack[..., None] if slack.ndim else limits.clamp(min=0).sqrt() + slack) ** 2 * (1 + 1e-4)).float()
