"""EM for Gaussian mixtures with full covariances: what scikit-learn's GaussianMixture finds, in a fraction of the time.

fit_dense is EM as every textbook has it, and says what a fit is. fit_mixture gives the same, but on a CPU it computes
only what can have changed. In hundreds of dimensions nearly every point belongs to one component alone and soon stays
there. This is the life of a point:

- It begins as doubtful: nothing is known of it. Its distance to its own component is computed, and the other
  components get lower bounds of theirs.
- It is settled if the bounds show that each other component's share of it is negligible. Its own component keeps a
  share of 1, and nothing is computed.
- It is open if a component may have a share of it beside its own. The distances to these are computed, and its shares
  from them. It stays open as long as several components hold a share.
- It is doubtful again when the components have moved so far that its bounds show nothing any more.

Covariances, too, are updated by the shares that changed. What is left out is below the last bits of every sum.
Stands alone, with screen.py, which has the bounds, and the error of parts.py.
"""

import math
from dataclasses import dataclass

import torch

from models.eval.codebooks import CollapsedComponent
from models.eval.screen import BLOCK, Screen, directions, steps_of

TOLERANCE, REGULARISATION, ITERATIONS = 1e-3, 1e-6, 100  # scikit-learn's defaults
TINY = 10 * torch.finfo(torch.float64).eps  # what scikit-learn adds to a component's total, so that none is 0
MEMORY = 1 << 27  # bytes of the largest matrix in a step of fit_dense
# A component whose log-probability is this far below the likeliest's has a share below e^-50 = 2e-22 of a point. A
# million of those are 2e-16. A component whose total is below WEAK may still feel them, so then nothing is left out.
NEGLIGIBLE, WEAK = 50.0, 1e-3


@dataclass(frozen=True)
class Mixture:
    """K components in d dimensions, float64."""

    means: torch.Tensor  # (K, d)
    weights: torch.Tensor  # (K,)
    lower_bound: float  # mean log-likelihood in the last iteration, before its M step
    iterations: int
    converged: bool


def fit_mixture(points, start, count):
    """Fit a full-covariance Gaussian mixture of `count` components in float64, on the device of `points`.

    points: (N, d) floating; start: (N,) int, the component that each point starts in.
    Returns the Mixture that scikit-learn's GaussianMixture finds from the same start in float64, to rounding and in as
    many iterations. Raises CollapsedComponent, naming the component.
    """
    fit = _fit_screened if points.device.type == "cpu" else fit_dense
    return fit(points, start, count)


# --- plain EM


@torch.inference_mode()
def fit_dense(points, start, count):
    """fit_mixture by the definition, on any device: every distance and every covariance is computed in full.

    shares: (K, N), how much of each point each component takes, at first all or nothing. The M step makes components
    from shares, the E step shares from components, until the mean log-likelihood rests.
    """
    points, centre, shares = _begin(points, start, count)
    totals, means, roots, failed = _maximise(points, centre, shares)
    _refuse_collapse(failed.tolist())
    bound, iteration, converged = -math.inf, 0, False
    while iteration < ITERATIONS and not converged:
        iteration, previous = iteration + 1, bound
        shares, evidence = _expect(points, totals, means, roots)
        totals, means, roots, failed = _maximise(points, centre, shares)
        evidence, *failed = torch.cat([evidence[None], failed]).tolist()  # the only time that a GPU is waited for
        _refuse_collapse(failed)
        bound = evidence / len(points)
        converged = abs(bound - previous) < TOLERANCE
    return Mixture(means + centre, totals / totals.sum(), bound, iteration, converged)


def _expect(points, totals, means, roots):
    """E step: (shares (K, N), total log-likelihood)."""
    shares, evidence = points.new_empty(len(means), len(points)), 0
    constants = _constants(totals, roots)
    for block, share in _blocks(points, shares):
        squares = ((block - means[:, None]) @ roots.mT).square_().sum(dim=2)  # (K, block)
        joint = constants[:, None] - squares / 2
        share.copy_(joint.softmax(dim=0))
        evidence = evidence + joint.logsumexp(dim=0).sum()
    return shares, evidence


def _maximise(points, centre, shares):
    """M step: (totals (K,), means (K, d), inverse Cholesky factors (K, d, d), which of them failed (K,) float64)."""
    totals = shares.sum(dim=1) + TINY
    means = (shares @ points - TINY * centre) / totals[:, None]  # TINY is added at the origin that the caller has
    covariances = points.new_zeros(len(means), *2 * means.shape[1:])
    for block, share in _blocks(points, shares):
        offsets = (block - means[:, None]) * share.sqrt()[:, :, None]  # (K, block, d)
        covariances.baddbmm_(offsets.mT, offsets)
    covariances /= totals[:, None, None]
    covariances.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
    factors, failed = torch.linalg.cholesky_ex(covariances)
    one = torch.eye(means.shape[1], dtype=points.dtype, device=points.device).expand_as(factors)
    return totals, means, torch.linalg.solve_triangular(factors, one, upper=False), failed.double()


def _blocks(points, shares):
    """Blocks of points (N, d) and of shares (K, N), such that K · block · d numbers fit into MEMORY."""
    size = max(1, MEMORY // (8 * len(shares) * points.shape[1]))
    return zip(points.split(size), shares.split(size, dim=1), strict=True)


# --- what both share


def _begin(points, start, count):
    """(points less their mean, as sums about a distant origin would lose digits; the mean; the first shares)."""
    points = points.double()
    centre = points.mean(dim=0)
    components = torch.arange(count, device=points.device)
    return points - centre, centre, (start.to(points.device) == components[:, None]).double()


def _constants(totals, roots):
    """(K,): a point's log-probability in a component is this less half its squared distance."""
    log_determinants = roots.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return (totals / totals.sum()).log() + log_determinants - roots.shape[1] / 2 * math.log(2 * math.pi)


def _refuse_collapse(failed):
    for component, problem in enumerate(failed):
        if problem:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")


# --- screened EM


@torch.inference_mode()
def _fit_screened(points, start, count):
    points, centre, shares = _begin(points, start, count)
    turn = directions(points, REGULARISATION)
    points, centre = points @ turn, centre @ turn
    components, screen = _Components(points, centre, count), Screen(points, shares.argmax(dim=0), count)
    components.maximise(shares)
    bound, iteration, converged = -math.inf, 0, False
    while iteration < ITERATIONS and not converged:
        iteration, previous = iteration + 1, bound
        shares, evidence = _expect_screened(components, screen)
        components.maximise(shares)
        bound = evidence.item() / len(points)
        converged = abs(bound - previous) < TOLERANCE
    weights = components.totals / components.totals.sum()
    return Mixture((components.means + centre) @ turn.T, weights, bound, iteration, converged)


def _expect_screened(components, screen):
    """E step: (shares (K, N), not exact where they are negligible; total log-likelihood)."""
    old, likeliest = components.shares, screen.likeliest
    constants = _constants(components.totals, components.roots)
    squares = torch.full_like(old, math.inf)  # the distances that are computed
    screen.age(components.drifts, components.shifts)

    # Points of which several components hold a share are open. All that held one are computed: a share that has
    # become negligible must be replaced, too, before the point can settle.
    held = old > math.exp(-NEGLIGIBLE)
    is_open = held.sum(dim=0) > 1
    held &= is_open
    doubtful = screen.near(screen.limits(constants, NEGLIGIBLE)).any(dim=0)
    theirs = torch.zeros_like(held).scatter_(0, likeliest[None], doubtful[None])  # the doubtful points' own component
    components.compute(squares, held | theirs)
    screen.settle(likeliest, squares)

    # With that known of their own components, the screen tells which others matter to doubtful points.
    limits = screen.limits(constants, NEGLIGIBLE).masked_fill_(held, 0)
    near = screen.survivors(components.means, components.roots, components.norms, limits)
    components.compute(squares, near)
    is_open |= near.any(dim=0)

    shares, evidence = _share(old, constants, squares, is_open)
    if (shares.sum(dim=1) < WEAK).any():
        components.compute(squares, squares == math.inf)
        is_open.fill_(True)
        shares, evidence = _share(old, constants, squares, is_open)
    evidence += _settled_evidence(components, constants, squares, is_open, likeliest)
    screen.settle(shares.argmax(dim=0), squares)
    return shares, evidence


def _share(old, constants, squares, is_open):
    """(shares (K, N), new ones where points are open (N,) and old ones elsewhere; log-likelihood of open points)."""
    some = is_open.nonzero()[:, 0]
    joint = constants[:, None] - squares.index_select(1, some) / 2
    return old.index_copy(1, some, joint.softmax(dim=0)), joint.logsumexp(dim=0).sum()


def _settled_evidence(components, constants, squares, is_open, likeliest):
    """Log-likelihood of the settled points, without their distances: covariances know the sum of these.

    Take one component with its covariance C = Σ r · (point − mean)(point − mean)ᵀ / total + ε, where r are the shares
    that it was made of and ε is REGULARISATION. The squared distance of a point is (point − mean)ᵀ C⁻¹ (point − mean),
    or trace(C⁻¹ (point − mean)(point − mean)ᵀ). So over all points

        Σ r · squared distance = trace(C⁻¹ · total · (C − ε)) = total · (d − ε · trace(C⁻¹)) = total · (d − ε · ‖root‖²)

    Take from this what open points contribute, r · squared distance, and the rest is of the settled points. The r of
    those is 1 in their own component and negligible in others.
    """
    width = components.points.shape[1]
    lengths = components.totals * (width - REGULARISATION * components.norms.square())
    lengths -= torch.where(is_open & (squares < math.inf), components.shares * squares, 0).sum(dim=1)
    settled = likeliest[~is_open].bincount(minlength=len(constants))
    return settled.double() @ constants - lengths.sum() / 2


class _Components:
    """What the M step makes of shares (K, N).

    totals: (K,); means: (K, d); factors: (K, d, d) lower Cholesky factors of the covariances; roots: their inverses;
    norms: (K,) those of the roots. drifts, shifts: (K,) what the last M step did, see screen.py.
    """

    def __init__(self, points, centre, count):
        self.points, self.centre, self.shares = points, centre, None
        self.steps = steps_of(points.shape[1])
        self.means = points.new_zeros(count, points.shape[1])
        # Σ share · (point − origin) and Σ share · (point − origin)(point − origin)ᵀ, about a point of the component;
        # of the latter only the lower triangle is kept up.
        self.origins, self.moments = torch.zeros_like(self.means), torch.zeros_like(self.means)
        self.scatters = points.new_zeros(count, *2 * points.shape[1:])
        self.factors, self.roots = torch.zeros_like(self.scatters), torch.zeros_like(self.scatters)
        self.norms = points.new_zeros(count)

    def compute(self, squares, wanted):
        """Put squared distances into squares (K, N) where they are wanted (K, N)."""
        for component, mask in enumerate(wanted):
            for part in mask.nonzero()[:, 0].split(BLOCK):
                offsets, found = self.points.index_select(0, part).sub_(self.means[component]), 0
                for start, stop in self.steps:  # which spare the zeros of the triangular root
                    found += (offsets[:, :stop] @ self.roots[component, start:stop, :stop].T).square_().sum(dim=1)
                squares[component].index_copy_(0, part, found)

    def maximise(self, shares):
        """M step. Raises CollapsedComponent."""
        first = self.shares is None
        changes, self.shares = shares if first else shares - self.shares, shares
        self.totals = shares.sum(dim=1) + TINY
        self.drifts, self.shifts = torch.zeros_like(self.totals), torch.zeros_like(self.totals)
        for component, change in enumerate(changes):
            if first or change.any():
                self._add(component, change)
                self._factorise(component)

    def _add(self, component, change):
        """Add a change (N,) of shares to the moments, or start them anew where that is less work."""
        share = self.shares[component]
        if 2 * change.count_nonzero() > share.count_nonzero():
            change = share
            self.origins[component] = self.points[share.argmax()]
            self.moments[component] = self.scatters[component] = 0
        for part in change.nonzero()[:, 0].split(BLOCK):
            offsets = self.points.index_select(0, part).sub_(self.origins[component])
            weighted = offsets * change[part, None]
            self.moments[component] += weighted.sum(dim=0)
            for start, stop in self.steps:
                self.scatters[component, start:stop, :stop].addmm_(weighted[:, start:stop].T, offsets[:, :stop])

    def _factorise(self, component):
        """Make mean, factor and root from the moments."""
        total, origin, moment = self.totals[component], self.origins[component], self.moments[component]
        weight = total - TINY
        mean = (moment + weight * origin - TINY * self.centre) / total
        # From the scatter about the origin to that about the mean: − moved · halfᵀ − half · movedᵀ.
        moved = mean - origin
        half = moment - weight * moved / 2
        covariance = self.scatters[component].addr(moved, half, alpha=-1).addr_(half, moved, alpha=-1).div_(total)
        covariance.diagonal().add_(REGULARISATION)
        factor, failed = torch.linalg.cholesky_ex(covariance)  # of its lower triangle
        if failed:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")
        root = _inverse(factor)
        drift = 0
        for start, stop in self.steps:  # root · old factor − 1
            rows = root[start:stop, :stop] @ self.factors[component, :stop, :stop]
            rows.diagonal(start).sub_(1)
            drift += rows.square_().sum()
        self.drifts[component] = drift.sqrt()
        self.shifts[component] = (root @ (mean - self.means[component])).norm()
        self.norms[component] = root.norm()
        self.means[component], self.factors[component], self.roots[component] = mean, factor, root


def _inverse(factor):
    """Inverse of a lower triangular (d, d), by halves, which spares the zeros."""
    half = len(factor) // 2
    if half < 64:
        return torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
    root = torch.zeros_like(factor)
    root[:half, :half], root[half:, half:] = _inverse(factor[:half, :half]), _inverse(factor[half:, half:])
    root[half:, :half] = -root[half:, half:] @ (factor[half:, :half] @ root[:half, :half])
    return root
