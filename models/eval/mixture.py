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
SLACK = 4.0  # by which the bound of a point's squared distance to its component may grow before it is computed again
STEPS = 4  # in which all coordinates are taken
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
    components.maximise(members.T.contiguous())
    weights = components.totals / len(points)
    screen, bound = _Screen(components, likeliest), -math.inf
    for iteration in range(1, ITERATIONS + 1):  # noqa: B007, it is returned
        previous = bound
        shares, evidence = _expect(components, weights.log(), screen)
        components.maximise(shares)
        weights = components.totals / components.totals.sum()
        bound = evidence.item() / len(points)
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
        stops = sorted({-(-width * step // STEPS) for step in range(1, STEPS + 1)})
        self.steps = list(zip([0, *stops], stops, strict=False))
        self.means = points.new_zeros(count, width, dtype=torch.float64)
        # Σ share · (point − origin) and Σ share · (point − origin)(point − origin)ᵀ, about a point of the component;
        # of the latter only the lower triangle is kept up.
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
            for start, stop in self.steps:
                self.scatters[component, start:stop, :stop].addmm_(weighted[:, start:stop].T, offsets[:, :stop])

    def _factorise(self, component, share_sum):
        total, origin, before = self.totals[component], self.origins[component], self.means[component].clone()
        mean = (self.moments[component] + share_sum * origin) / total
        # From the scatter about the origin to that about the mean: − moved · halfᵀ − half · movedᵀ.
        moved = mean - origin
        pair = torch.stack([moved, self.moments[component] - share_sum * moved / 2])
        covariance = torch.addmm(self.scatters[component], pair.T, pair.flip(0), alpha=-1).div_(total)
        covariance.diagonal().add_(REGULARISATION)
        factor, failed = torch.linalg.cholesky_ex(covariance)  # of its lower triangle
        if failed:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")
        root, drift = torch.zeros_like(factor), torch.zeros_like(factor)
        for start, stop in self.steps:  # some rows of factor · root = 1 and of root · old factor − 1
            right = torch.eye(stop, dtype=factor.dtype, device=factor.device)[start:]
            right[:, :start] = -(factor[start:stop, :start] @ root[:start, :start])
            root[start:stop, :stop] = torch.linalg.solve_triangular(factor[start:stop, start:stop], right, upper=False)
            drift[start:stop, :stop] = root[start:stop, :stop] @ self.factors[component, :stop, :stop]
        drift.diagonal().sub_(1)
        shift = root @ (mean - before)
        self.drifts[component] = drift.square_().sum(dim=1).cumsum(dim=0).sqrt_()
        self.shifts[component] = shift.square_().cumsum(dim=0).sqrt_()
        self.means[component], self.factors[component], self.roots[component] = mean, factor, root


def _expect(components, log_weights, screen):
    """E step: (responsibilities (K, N), not exact where they are negligible (see NEGLIGIBLE); total log-likelihood).

    Most points belong to one component alone, and bounds of their distances show that they still do. Their
    responsibilities stay as they are, and the sum of their squared distances follows from the covariance, which fixes
    that of all points, weighted by the responsibilities it is made of. The other points are open: computed exactly.
    """
    points, means, roots, old = components.points, components.means, components.roots, components.shares
    width, likeliest = points.shape[1], screen.likeliest
    everyone = torch.arange(len(points), device=points.device)
    constants = log_weights + roots.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    constants -= width / 2 * math.log(2 * math.pi)
    squares = torch.full_like(old, math.inf)

    def compute(component, part):
        for rows in part.split(BLOCK):
            offsets = points.index_select(0, rows).sub_(means[component])
            squares[component].index_copy_(0, rows, _squares(offsets, roots[component], components.steps))

    def compute_own(some):
        for component in range(len(means)):
            compute(component, (some & (likeliest == component)).nonzero()[:, 0])

    compute_own(screen.open)
    own = screen.own_squares(components, squares[likeliest, everyone])
    # The squared distance below which a component matters to a point.
    limits = own + 2 * (constants[:, None] - constants[likeliest] + NEGLIGIBLE)
    held = old > math.exp(-NEGLIGIBLE)
    limits.masked_fill_(held, math.inf)
    limits[likeliest, everyone] = -math.inf
    now_open = torch.zeros_like(screen.open)
    for component, part in enumerate(screen.survivors(components, limits)):
        compute(component, part)
        now_open.index_fill_(0, part, True)
    compute_own(now_open & ~screen.open)

    def share(some):
        joint = constants[:, None] - squares.index_select(1, some) / 2
        evidence = joint.logsumexp(dim=0)
        return evidence.sum(), old.index_copy(1, some, (joint - evidence).exp_())

    evidence, shares = share(now_open.nonzero()[:, 0])
    weak = (shares.sum(dim=1) < 1).nonzero()[:, 0].tolist()
    if weak:
        compute_own(~(now_open | screen.open))
        for component in weak:
            compute(component, everyone)
        now_open.fill_(True)
        evidence, shares = share(everyone)
    settled = torch.bincount(likeliest[~now_open], minlength=len(means))
    lengths = components.totals * (width - REGULARISATION * roots.square().sum(dim=(1, 2)))
    lengths -= torch.where(held & now_open, old * squares, 0).sum(dim=1)
    screen.settle(shares, squares, now_open)
    return shares, evidence + settled.double() @ constants - lengths[settled > 0].sum() / 2


def _squares(offsets, root, steps):
    """Squared lengths (N,) of root · offset for offsets (N, d) and the lower triangular root (d, d)."""
    found = offsets.new_zeros(len(offsets))
    for start, stop in steps:
        found += (offsets[:, :stop] @ root[start:stop, :stop].T).square_().sum(dim=1)
    return found


class _Screen:
    """Tells which points may lie nearer to a component than a limit, from lower bounds of their distances.

    The distance is the length of root · (point − mean). As root is triangular, its first p rows give the distance in
    the first p coordinates alone: a lower bound, for most points high enough with few coordinates. So is an old one,
    less what the component's change can have taken from it. Bounds are float32 and allow for its rounding.

    likeliest: (N,) component of each point; open: (N,) whether it was not the only one that mattered; own: (N,) upper
    bounds of the distances to it, and of their squares when they were last computed.
    """

    def __init__(self, components, likeliest):
        points, self.steps = components.points, components.steps
        self.centre = points.mean(dim=0)
        self.points = (points - self.centre).float()
        self.longest = self.points.norm(dim=1).max().double()
        self.bounds = self.points.new_zeros(len(components.means), len(points))
        self.reached = torch.zeros_like(self.bounds, dtype=torch.long)  # the step that each bound is of
        self.likeliest, self.open = likeliest, torch.zeros_like(likeliest, dtype=torch.bool)
        self.own, self.computed = torch.full_like(points[:, 0], math.inf), torch.zeros_like(points[:, 0])

    def own_squares(self, components, exact):
        """Upper bounds (N,) of the squared distances to the likeliest components, `exact` where points were open."""
        growth = 1 + 1e-5 + components.drifts[:, -1]
        self.own.mul_(growth[self.likeliest]).add_(components.shifts[:, -1][self.likeliest])
        loose = (self.own.square() > self.computed + SLACK) & ~self.open
        means, products, margins, shrink = self._single(components)
        for component in range(len(means)):
            for part in (loose & (self.likeliest == component)).nonzero()[:, 0].split(BLOCK):
                offsets = self.points.index_select(0, part).sub_(means[component])
                lengths = _squares(offsets, products[component], self.steps).sqrt_()
                self.own[part] = lengths.add_(margins[component]).div_(shrink).double()
        self.computed = torch.where(loose, self.own.square(), self.computed)
        return torch.where(self.open, exact, self.own.square())

    def settle(self, shares, squares, now_open):
        """Keep what an E step found out."""
        self.likeliest, self.open = torch.where(now_open, shares.argmax(dim=0), self.likeliest), now_open
        exact = squares.gather(0, self.likeliest[None])[0]
        self.computed = torch.where(now_open, exact, self.computed)
        self.own = torch.where(now_open, exact.sqrt(), self.own)

    def _single(self, components):
        """(means, roots, margins (K, 1), shrink): a length in float32 is off by up to its margin and a factor."""
        means, roots = components.means - self.centre, components.roots
        # The usual bounds of a product and of a sum of squares in float32.
        roundings = (means.shape[1] + 8) * 2**-24
        margins = (roundings * (self.longest + means.norm(dim=1)) * roots.norm(dim=(1, 2))).float()[:, None]
        return means.float(), roots.float(), margins, 1 - 1e-4

    def survivors(self, components, limits):
        """For each component the points (indices) whose squared distance may be below limits (K, N).

        Where a limit is infinite nothing is computed.
        """
        self._age(components)
        means, products, margins, shrink = self._single(components)
        reach = limits.clamp(min=0).sqrt_().float()
        near = (self.bounds < reach) & (limits > 0) & (limits < math.inf)
        enough = reach.add_(margins).div_(shrink).square_()  # a sum of squares beyond it shows a bound beyond reach
        squares = torch.zeros_like(self.bounds)
        moves = -(products @ means[:, :, None])[:, :, 0]
        for component, product in enumerate(products):
            survivors = [limits[component].isposinf().nonzero()[:, 0]]
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
