"""EM for Gaussian mixtures with full covariances: scikit-learn's GaussianMixture, several times as fast.

In hundreds of dimensions responsibilities are almost one-hot and most of them settle within a few iterations. Lower
bounds of the Mahalanobis distance show which are negligible; only the others are computed, and covariances are updated
by what changed. What is left out is below the last bit of every sum. Stands alone.
"""

import math
from dataclasses import dataclass

import torch

TOLERANCE, REGULARISATION, ITERATIONS = 1e-3, 1e-6, 100  # scikit-learn's defaults
# A component whose log-probability is this far below a point's best has a responsibility below e^-50 = 2e-22, and a
# million of those do not reach the last bit of a component's total of 1. Components below that are computed in full.
NEGLIGIBLE = 50.0
HEADROOM = 1.1  # bounds are improved until they are this far beyond a limit, so that small changes do not undo them
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
def fit_mixture(points, start, count):
    """Fit a full-covariance Gaussian mixture of `count` components in float64, on the device of `points`.

    points: (N, d) floating; start: (N,) int, the component that each point starts in.
    Returns the Mixture that scikit-learn's GaussianMixture finds from the same start in float64, to rounding and in as
    many iterations. Raises CollapsedComponent, naming the component.
    """
    likeliest = start.to(points.device).long()
    components = _Components(points, count)
    components.maximise(torch.nn.functional.one_hot(likeliest, count).T.double())
    weights = components.totals / len(points)
    screen, bound = _Screen(points, count), -math.inf
    for iteration in range(1, ITERATIONS + 1):  # noqa: B007, it is returned
        previous = bound
        shares, evidence = _expect(points, components, weights.log(), likeliest, screen)
        likeliest = shares.argmax(dim=0)
        components.maximise(shares)
        weights = components.totals / components.totals.sum()
        bound = evidence.mean().item()
        converged = abs(bound - previous) < TOLERANCE
        if converged:
            break
    return Mixture(components.means, weights, bound, iteration, converged)


class _Components:
    """What the M step makes of responsibilities (K, N), float64.

    totals: (K,); means: (K, d); factors: (K, d, d) lower Cholesky factors of the covariances; roots: their inverses.
    The last step took y = root · (point − mean) to A · y + shift: drifts: (K,) ‖A − 1‖; shifts: (K,) ‖shift‖.
    """

    def __init__(self, points, count):
        width = points.shape[1]
        self.points, self.shares = points, None
        self.means = points.new_zeros(count, width, dtype=torch.float64)
        # Σ share · (point − origin) and Σ share · (point − origin)(point − origin)ᵀ, about a point of the component.
        self.origins, self.moments = torch.zeros_like(self.means), torch.zeros_like(self.means)
        self.scatters = self.means.new_zeros(count, width, width)
        self.factors, self.roots = torch.zeros_like(self.scatters), torch.zeros_like(self.scatters)
        self.drifts, self.shifts = self.means.new_zeros(count), self.means.new_zeros(count)

    def maximise(self, shares):
        """M step. Raises CollapsedComponent."""
        sums = shares.sum(dim=1)
        self.totals = sums + 10 * torch.finfo(torch.float64).eps
        for component, share in enumerate(shares):
            changed = share if self.shares is None else share - self.shares[component]
            if self.shares is None or changed.any():
                self._update(component, share, changed)
                self._factorise(component, sums[component])
            else:
                self.drifts[component] = self.shifts[component] = 0
        self.shares = shares

    def _update(self, component, share, change):
        """Add what changed to the moments; start anew where that is less work, or where what is left is small."""
        anew = self.shares is None or self.totals[component] < 1
        if anew or 2 * change.count_nonzero() > share.count_nonzero():
            change = share
            self.origins[component] = self.points[share.argmax()]
            self.moments[component] = self.scatters[component] = 0
        for part in change.nonzero()[:, 0].split(BLOCK):
            offsets = self.points.index_select(0, part).double().sub_(self.origins[component])
            weighted = offsets * change[part, None]
            self.moments[component] += weighted.sum(dim=0)
            self.scatters[component].addmm_(weighted.T, offsets)

    def _factorise(self, component, share_sum):
        total, origin, before = self.totals[component], self.origins[component], self.means[component].clone()
        mean = (self.moments[component] + share_sum * origin) / total
        # From the scatter about the origin to that about the mean: − moved · halfᵀ − half · movedᵀ.
        moved = mean - origin
        pair = torch.stack([moved, self.moments[component] - share_sum * moved / 2])
        covariance = torch.addmm(self.scatters[component], pair.T, pair.flip(0), alpha=-1).div_(total)
        covariance.diagonal().add_(REGULARISATION)
        factor, failed = torch.linalg.cholesky_ex(covariance)
        if failed:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")
        root = torch.linalg.solve_triangular(factor, torch.eye(len(mean)).to(factor), upper=False)
        drift = root @ self.factors[component]
        drift.diagonal().sub_(1)
        self.drifts[component], self.shifts[component] = drift.norm(), (root @ (mean - before)).norm()
        self.means[component], self.factors[component], self.roots[component] = mean, factor, root


def _expect(points, components, log_weights, likeliest, screen):
    """E step: (responsibilities (K, N), 0 where they are negligible (see NEGLIGIBLE); log-likelihoods (N,)).

    likeliest: (N,) component of each point in the last iteration. Its value comes first and is exact; others that
    are bounded far below it are not computed.
    """
    means, roots = components.means, components.roots
    constants = log_weights + roots.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    constants -= points.shape[1] / 2 * math.log(2 * math.pi)
    joint = means.new_full((len(means), len(points)), -math.inf)

    def compute(component, part):
        for rows in part.split(BLOCK):
            offsets = points.index_select(0, rows).double().sub_(means[component])
            lengths = torch.linalg.vector_norm(offsets @ roots[component].T, dim=1)
            joint[component].index_copy_(0, rows, constants[component] - lengths.square_() / 2)

    for component in range(len(means)):
        compute(component, (likeliest == component).nonzero()[:, 0])
    everyone = torch.arange(len(points), device=points.device)
    # The squared distance below which a component matters to a point.
    limits = 2 * (constants[:, None] - joint[likeliest, everyone] + NEGLIGIBLE)
    limits[likeliest, everyone] = -math.inf
    for component, part in enumerate(screen.survivors(components, limits)):
        compute(component, part)
    evidence = joint.logsumexp(dim=0)
    shares = (joint - evidence).exp_()
    weak = (shares.sum(dim=1) < 1).nonzero()[:, 0].tolist()
    if weak:
        for component in weak:
            compute(component, everyone)
        evidence = joint.logsumexp(dim=0)
        shares = (joint - evidence).exp_()
    return shares, evidence


class _Screen:
    """Tells which points may lie nearer to a component than a limit, from lower bounds of their distances.

    The distance is the length of root · (point − mean). Its projection onto any subspace is a lower bound. So is an
    old one, less what the component's change can have taken from it. Bounds are float32 and allow for its rounding.
    """

    def __init__(self, points, count):
        width = points.shape[1]
        self.points = points.float()
        self.longest = self.points.norm(dim=1).max().double()
        self.moment = (self.points.T @ self.points / len(points)).double()
        self.centre = self.points.mean(dim=0).double()
        self.bounds = None
        generator = torch.Generator().manual_seed(0)  # leaves the caller's randomness alone
        start = torch.randn(count, width, max(1, width // 4), dtype=torch.float64, generator=generator)
        self.subspaces = start.to(points.device)

    def survivors(self, components, limits):
        """For each component the points (indices) whose squared distance may be below limits (K, N)."""
        means, roots = components.means, components.roots
        first = self.bounds is None
        if first:
            self.bounds = torch.zeros_like(limits, dtype=torch.float32)
        else:  # ‖A · y + shift‖ ≥ (1 − ‖A − 1‖) ‖y‖ − ‖shift‖
            self.bounds *= (1 - 1e-5 - components.drifts).clamp(min=0)[:, None]
            self.bounds -= components.shifts[:, None]
        reach = limits.clamp(min=0).sqrt_().float()
        near = (self.bounds < reach) & (limits > 0)
        looks = [(roots.mT, 1.0)]
        if near.count_nonzero() > 2 * len(self.points):
            directions = self._directions(means, roots, steps=3 if first else 1)
            few = directions[:, :, : -(-directions.shape[2] // 2)]
            self._look_at_all(means, few, near, reach)
            looks = [(directions, HEADROOM), *looks]
        margins = [self._margins(means, product).tolist() for product, _ in looks]
        for component, mean in enumerate(means.float()):
            products = [product[component].float() for product, _ in looks]
            survivors = [near.new_empty(0, dtype=torch.long)]
            for part in near[component].nonzero()[:, 0].split(BLOCK):
                offsets = self.points.index_select(0, part).sub_(mean)
                for product, margin, (_, headroom) in zip(products, margins, looks, strict=True):
                    bounds = _bounds(offsets @ product, margin[component])
                    self.bounds[component].index_copy_(0, part, bounds)
                    kept = (bounds < headroom * reach[component].index_select(0, part)).nonzero()[:, 0]
                    part = part.index_select(0, kept)
                    if product is not products[-1]:
                        offsets = offsets.index_select(0, kept)
                survivors.append(part)
            yield torch.cat(survivors)

    def _look_at_all(self, means, directions, near, reach):
        """Clear `near` by a few directions, for components near to many points: no copies of points are made."""
        shifts = (means[:, None, :] @ directions)[:, 0].float()
        margins = self._margins(means, directions).tolist()
        for component, product in enumerate(directions.float()):
            if 4 * near[component].count_nonzero() > len(self.points):
                bounds = _bounds((self.points @ product).sub_(shifts[component]), margins[component])
                self.bounds[component] = bounds
                near[component] &= bounds < HEADROOM * reach[component]

    def _margins(self, means, products):
        """What rounding can add to the length of a float32 product, by the usual bound: (K,)."""
        roundings = (means.shape[1] + 8) * 2**-24
        return roundings * (self.longest + means.norm(dim=1)) * products.norm(dim=(1, 2))

    def _directions(self, means, roots, steps):
        """Directions (K, d, q) in which points are far from each component, farthest first; orthonormal once whitened.

        They approach the leading eigenvectors of root · E[(point − mean)(point − mean)ᵀ] · rootᵀ by subspace
        iteration, which goes on from one call to the next. Worse ones leave more survivors, not other results.
        """
        for _ in range(steps):
            basis = torch.linalg.qr(self.subspaces).Q
            turned = roots.mT @ basis
            along = means[:, None, :] @ turned  # (K, 1, q)
            image = self.moment @ turned - self.centre[:, None] * along
            image -= means[:, :, None] * (self.centre @ turned)[:, None, :]
            image += means[:, :, None] * along
            self.subspaces = roots @ image
        order = torch.linalg.eigh(basis.mT @ self.subspaces).eigenvectors.flip(2)
        self.subspaces = self.subspaces @ order
        return turned @ order


def _bounds(offsets, margin):
    """Lower bounds of the lengths of float32 `offsets` (n, q)."""
    return offsets.norm(dim=1).mul_(1 - 1e-4).sub_(margin)
