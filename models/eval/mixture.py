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
STEPS = 6  # in which the screen takes all coordinates
BLOCK = 4096  # points at a time: bounds the memory, fits a cache


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
    points = points.double()
    members = torch.nn.functional.one_hot(likeliest, count).double()
    rotation = _rotation(points, members)
    points = points @ rotation
    components = _Components(points, count)
    components.maximise(members.T)
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
    return Mixture(components.means @ rotation.T, weights, bound, iteration, converged)


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
        self.drifts, self.shifts = torch.zeros_like(self.means), torch.zeros_like(self.means)

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
            offsets = self.points.index_select(0, part).sub_(self.origins[component])
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
        shift = root @ (mean - before)
        self.drifts[component] = drift.square_().sum(dim=1).cumsum(dim=0).sqrt_()
        self.shifts[component] = shift.square_().cumsum(dim=0).sqrt_()
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
            offsets = points.index_select(0, rows).sub_(means[component])
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

    The distance is the length of root · (point − mean). As root is triangular, its first p rows give the distance in
    the first p coordinates alone: a lower bound, for most points high enough with few coordinates. So is an old one,
    less what the component's change can have taken from it. Bounds are float32 and allow for its rounding.
    """

    def __init__(self, points, count):
        width = points.shape[1]
        self.centre = points.mean(dim=0)
        self.points = (points - self.centre).float()
        self.longest = self.points.norm(dim=1).max().double()
        stops = sorted({-(-width * step // STEPS) for step in range(1, STEPS + 1)})
        self.steps = list(zip([0, *stops], stops, strict=False))
        self.bounds = self.points.new_zeros(count, len(points))
        self.reached = torch.zeros_like(self.bounds, dtype=torch.long)  # the step that each bound is of

    def survivors(self, components, limits):
        """For each component the points (indices) whose squared distance may be below limits (K, N)."""
        self._age(components)
        means, roots = components.means - self.centre, components.roots
        # What rounding can add to a length: of the product in float32, by the usual bound, and of the sum of squares.
        roundings, shrink = (means.shape[1] + 8) * 2**-24, 1 - 1e-4
        margins = (roundings * (self.longest + means.norm(dim=1)) * roots.norm(dim=(1, 2))).float()[:, None]
        reach = limits.clamp(min=0).sqrt_().float()
        near = (self.bounds < reach) & (limits > 0)
        enough = reach.add_(margins).div_(shrink).square_()  # a sum of squares beyond it shows a bound beyond reach
        squares = torch.zeros_like(self.bounds)
        moves, products = -(roots @ means[:, :, None])[:, :, 0].float(), roots.float()
        for component, product in enumerate(products):
            survivors = [near.new_empty(0, dtype=torch.long)]
            for part in near[component].nonzero()[:, 0].split(BLOCK):
                found, needed = 0, enough[component].index_select(0, part)
                for step, (start, stop) in enumerate(self.steps):
                    some = self.points[:, :stop].index_select(0, part)
                    values = torch.addmm(moves[component, start:stop], some, product[start:stop, :stop].T)
                    found = values.square_().sum(dim=1).add_(found)
                    squares[component].index_copy_(0, part, found)
                    self.reached[component].index_fill_(0, part, step)
                    kept = (found < needed).nonzero()[:, 0]
                    part, found, needed = (values.index_select(0, kept) for values in (part, found, needed))
                survivors.append(part)
            yield torch.cat(survivors)
        self.bounds = torch.where(near, squares.sqrt_().mul_(shrink).sub_(margins), self.bounds)

    def _age(self, components):
        """‖A · y + shift‖ ≥ (1 − ‖A − 1‖) · ‖y‖ − ‖shift‖, in the first coordinates as in all."""
        last = [stop - 1 for _, stop in self.steps]
        self.bounds *= (1 - 1e-5 - components.drifts[:, last]).clamp_(min=0).float().gather(1, self.reached)
        self.bounds -= components.shifts[:, last].float().gather(1, self.reached)


def _rotation(points, members):
    """Orthogonal (d, d): first the directions in which components (members (N, K)) differ, then of most variance.

    Turned points keep their distances, and the screen needs fewer of their coordinates. points: (N, d) float64.
    """
    sizes = members.sum(dim=0)
    offsets = members.T @ points / sizes.clamp(min=1)[:, None] - points.mean(dim=0) * (sizes > 0)[:, None]
    total = torch.atleast_2d(torch.cov(points.T, correction=0))
    within = total - offsets.T * (sizes / len(points)) @ offsets
    within.diagonal().add_(REGULARISATION)
    between = torch.linalg.solve_ex(within, offsets.T).result.nan_to_num(0, 0, 0)
    variance = torch.linalg.eigh(total).eigenvectors.flip(1)
    return torch.linalg.qr(torch.cat([between, variance], dim=1)).Q
