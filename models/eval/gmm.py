"""EM for full-covariance Gaussian mixtures: the result of scikit-learn's GaussianMixture, in a fraction of the time.

`fit_dense` is textbook EM, and defines the result. On a CPU `fit_mixture` gives the same result by screened EM, which
skips distances that cannot change it. In hundreds of dimensions nearly every point soon has a responsibility of 1 in
one component and 0 in all others. In an iteration of screened EM a point is one of three:

- hard-assigned: lower bounds of its distances prove that every other component's responsibility is negligible. Its
  component keeps the responsibility 1, and nothing is computed.
- ambiguous: several components may have a responsibility. The distances to these are computed, and from them the
  responsibilities.
- stale: its bounds no longer prove anything, because the components moved, or because nothing is known yet. The
  distance to its own component and new bounds of the others are computed; then it is hard-assigned or ambiguous.

The M step, too, adds only the responsibilities that changed to the scatter matrices. What is left out is below the last
bits of every sum.

Two facts bound the Mahalanobis distance of a point to a component, ‖P · (point − mean)‖, where P is the inverse of the
covariance's lower Cholesky factor (`precisions_cholesky`):

- P is lower triangular: its first p rows give the distance in the first p coordinates, which is no greater.
- An EM step takes y = P · (point − mean) to A · y + mean_shift. So ‖y‖ changes by at most ‖A − 1‖ · ‖y‖ + ‖mean_shift‖,
  and an old bound less that is still a bound.

`DistanceBounds.project` gives a third one. Bounds are float32 and allow for its rounding. Depends on NumPy and PyTorch.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models.eval.codebooks import CollapsedComponent
from models.eval.matching import matmul

TOLERANCE, REGULARISATION, ITERATIONS = 1e-3, 1e-6, 100  # scikit-learn's defaults
TINY = 10 * torch.finfo(torch.float64).eps  # what scikit-learn adds to a component's total, so that none is 0
DENSE_BYTES = 1 << 27  # largest matrix in an iteration of fit_dense
NUM_CHUNKS = 4  # coordinate chunks of a distance, with early exit after each
PROJECTED_POINTS = 1024  # points at a time in DistanceBounds.project
PROJECTED_SHARE = 0.25  # share of distances whose bounds prove nothing, above which all points are projected
BLOCK_POINTS = 4096  # points at a time: bounds the memory, fits a cache
# A component whose log-probability is this far below the likeliest component's has a responsibility below
# e^-50 = 2e-22. A million of those are 2e-16. Where a component's total is below WEAK they could move it: then all
# distances are computed.
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
    Returns the Mixture that scikit-learn's GaussianMixture finds from the same start in float64, up to rounding and in
    as many iterations. Raises CollapsedComponent, naming the component.
    """
    fit = _fit_screened if points.device.type == "cpu" else fit_dense
    return fit(points, start, count)


# --- dense EM


@torch.inference_mode()
def fit_dense(points, start, count):
    """`fit_mixture` by the definition, on any device: every distance and every covariance is computed in full.

    responsibilities: (K, N), at first 0 or 1. The M step computes components from responsibilities, the E step
    responsibilities from components, until the mean log-likelihood changes by less than TOLERANCE.
    """
    points, centre, responsibilities = _begin(points, start, count)
    totals, means, precisions_cholesky, failed = _maximise(points, centre, responsibilities)
    _refuse_collapse(failed.tolist())
    bound, iteration, converged = -math.inf, 0, False
    while iteration < ITERATIONS and not converged:
        iteration, previous = iteration + 1, bound
        responsibilities, log_likelihood = _expect(points, totals, means, precisions_cholesky)
        totals, means, precisions_cholesky, failed = _maximise(points, centre, responsibilities)
        # The only synchronisation with a GPU in an iteration.
        log_likelihood, *failed = torch.cat([log_likelihood[None], failed]).tolist()
        _refuse_collapse(failed)
        bound = log_likelihood / len(points)
        converged = abs(bound - previous) < TOLERANCE
    return Mixture(means + centre, totals / totals.sum(), bound, iteration, converged)


def _expect(points, totals, means, precisions_cholesky):
    """E step: (responsibilities (K, N), total log-likelihood)."""
    responsibilities, log_likelihood = points.new_empty(len(means), len(points)), 0
    constants = _constants(totals, precisions_cholesky)
    for block, out in _blocks(points, responsibilities):
        squares = ((block - means[:, None]) @ precisions_cholesky.mT).square_().sum(dim=2)  # (K, block)
        log_joint = constants[:, None] - squares / 2
        out.copy_(log_joint.softmax(dim=0))
        log_likelihood = log_likelihood + log_joint.logsumexp(dim=0).sum()
    return responsibilities, log_likelihood


def _maximise(points, centre, responsibilities):
    """M step: (totals (K,), means (K, d), precisions_cholesky (K, d, d), which factorisations failed (K,) float64)."""
    totals = responsibilities.sum(dim=1) + TINY
    # scikit-learn adds TINY to totals of points that are not centred.
    means = (responsibilities @ points - TINY * centre) / totals[:, None]
    covariances = points.new_zeros(len(means), *2 * means.shape[1:])
    for block, part in _blocks(points, responsibilities):
        offsets = (block - means[:, None]) * part.sqrt()[:, :, None]  # (K, block, d)
        covariances.baddbmm_(offsets.mT, offsets)
    covariances /= totals[:, None, None]
    covariances.diagonal(dim1=1, dim2=2).add_(REGULARISATION)
    factors, failed = torch.linalg.cholesky_ex(covariances)
    one = torch.eye(means.shape[1], dtype=points.dtype, device=points.device).expand_as(factors)
    return totals, means, torch.linalg.solve_triangular(factors, one, upper=False), failed.double()


def _blocks(points, responsibilities):
    """Blocks of points (N, d) and responsibilities (K, N), such that K · block · d numbers fit into DENSE_BYTES."""
    size = max(1, DENSE_BYTES // (8 * len(responsibilities) * points.shape[1]))
    return zip(points.split(size), responsibilities.split(size, dim=1), strict=True)


# --- shared by dense and screened EM


def _begin(points, start, count):
    """(centred points, since sums about a distant origin lose digits; their former mean; first responsibilities)."""
    centre = points.mean(dim=0, dtype=torch.float64)
    components = torch.arange(count, device=points.device)
    return points - centre, centre, (start.to(points.device) == components[:, None]).double()


def _constants(totals, precisions_cholesky):
    """(K,): a point's log-probability in a component is this less half its squared distance."""
    log_determinants = precisions_cholesky.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return (totals / totals.sum()).log() + log_determinants - precisions_cholesky.shape[1] / 2 * math.log(2 * math.pi)


def _refuse_collapse(failed):
    for component, problem in enumerate(failed):
        if problem:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")


# --- screened EM


@torch.inference_mode()
def _fit_screened(points, start, count):
    points, centre, responsibilities = _begin(points, start, count)
    rotation = pca_rotation(points, REGULARISATION)
    for block in points.split(BLOCK_POINTS):
        block.copy_(block @ rotation)
    centre = centre @ rotation
    components = _Components(points, centre, count)
    bounds = DistanceBounds(points, responsibilities.argmax(dim=0), count)
    components.maximise(responsibilities)
    bound, iteration, converged = -math.inf, 0, False
    while iteration < ITERATIONS and not converged:
        iteration, previous = iteration + 1, bound
        responsibilities, log_likelihood = _expect_screened(components, bounds)
        components.maximise(responsibilities)
        bound = log_likelihood.item() / len(points)
        converged = abs(bound - previous) < TOLERANCE
    weights = components.totals / components.totals.sum()
    return Mixture((components.means + centre) @ rotation.T, weights, bound, iteration, converged)


def _expect_screened(components, bounds):
    """E step: (responsibilities (K, N), not exact where they are negligible; total log-likelihood)."""
    old, likeliest = components.responsibilities, bounds.likeliest
    constants = _constants(components.totals, components.precisions_cholesky)
    squares = torch.full_like(old, math.inf)  # squared distances, inf where they are not computed
    bounds.loosen(components.scale_change, components.mean_shift)

    # Of ambiguous points, every component with a responsibility is computed again: one that has become negligible must
    # be replaced, too, before the point can be hard-assigned.
    shared = old > math.exp(-NEGLIGIBLE)
    ambiguous = shared.sum(dim=0) > 1
    shared &= ambiguous
    stale = bounds.below(bounds.thresholds(constants, NEGLIGIBLE)).any(dim=0)
    components.compute(squares, shared)
    bounds.update_own(likeliest, squares)

    # Find the other components that matter to stale points.
    current = components.means, components.precisions_cholesky, components.norms
    bounds.bound_own(*current, stale & ~ambiguous)
    thresholds = bounds.thresholds(constants, NEGLIGIBLE).masked_fill_(shared, 0)
    candidates = bounds.tighten(*current, thresholds)
    newly_ambiguous = candidates.any(dim=0) & ~ambiguous
    components.compute(squares, candidates.scatter_(0, likeliest[None], newly_ambiguous[None]))
    ambiguous |= newly_ambiguous

    responsibilities, log_likelihood = _replace_ambiguous(old, constants, squares, ambiguous)
    if (responsibilities.sum(dim=1) < WEAK).any():
        components.compute(squares, squares == math.inf)
        ambiguous.fill_(True)
        responsibilities, log_likelihood = _replace_ambiguous(old, constants, squares, ambiguous)
    log_likelihood += _hard_assigned_log_likelihood(components, constants, squares, ambiguous, likeliest)
    bounds.update_own(responsibilities.argmax(dim=0), squares)
    return responsibilities, log_likelihood


def _replace_ambiguous(old, constants, squares, ambiguous):
    """(responsibilities (K, N), recomputed for `ambiguous` points (N,), else `old`; log-likelihood of those points)."""
    chosen = ambiguous.nonzero()[:, 0]
    log_joint = constants[:, None] - squares.index_select(1, chosen) / 2
    return old.index_copy(1, chosen, log_joint.softmax(dim=0)), log_joint.logsumexp(dim=0).sum()


def _hard_assigned_log_likelihood(components, constants, squares, ambiguous, likeliest):
    """Log-likelihood of the hard-assigned points, without their distances: covariances give the sum of these.

    Take one component with its covariance C = Σ r · (point − mean)(point − mean)ᵀ / total + ε, where r are the
    responsibilities of the last M step and ε is REGULARISATION. The squared distance of a point is
    (point − mean)ᵀ C⁻¹ (point − mean), or trace(C⁻¹ (point − mean)(point − mean)ᵀ). So over all points

        Σ r · squared distance = trace(C⁻¹ · total · (C − ε)) = total · (d − ε · trace(C⁻¹)) = total · (d − ε · ‖P‖²)

    Subtract r · squared distance of the ambiguous points: what remains is of the hard-assigned points, of which r is 1
    in their own component and negligible in others.
    """
    width = components.points.shape[1]
    sums = components.totals * (width - REGULARISATION * components.norms.square())
    sums -= torch.where(ambiguous & (squares < math.inf), components.responsibilities * squares, 0).sum(dim=1)
    hard_assigned = likeliest[~ambiguous].bincount(minlength=len(constants))
    return hard_assigned.double() @ constants - sums.sum() / 2


class _Components:
    """The mixture's components, updated by the M step from responsibilities (K, N).

    totals: (K,); means: (K, d); factors: (K, d, d) lower Cholesky factors of the covariances; precisions_cholesky: the
    inverses of factors (the transpose of scikit-learn's attribute); norms: (K,) Frobenius norms of these.
    scale_change, mean_shift: (K,) ‖A − 1‖ and ‖mean_shift‖ of the last M step, see the module's docstring.
    """

    def __init__(self, points, centre, count):
        self.points, self.centre, self.responsibilities = points, centre, None
        self.chunks = coordinate_chunks(points.shape[1])
        self.means = points.new_zeros(count, points.shape[1])
        # Σ r · (point − origin) and Σ r · (point − origin)(point − origin)ᵀ, about one point of the component; of the
        # latter only the lower triangle is up to date.
        self.origins, self.first_moments = torch.zeros_like(self.means), torch.zeros_like(self.means)
        self.scatter_matrices = points.new_zeros(count, *2 * points.shape[1:])
        self.factors = torch.zeros_like(self.scatter_matrices)
        self.precisions_cholesky = torch.zeros_like(self.scatter_matrices)
        self.norms = points.new_zeros(count)

    def compute(self, squares, wanted):
        """Write squared distances into squares (K, N) where wanted (K, N) is true."""
        for component, mask in enumerate(wanted):
            for block in mask.nonzero()[:, 0].split(BLOCK_POINTS):
                offsets, total = self.points.index_select(0, block).sub_(self.means[component]), 0
                for start, stop in self.chunks:  # skips the zeros of the triangular matrix
                    rows = self.precisions_cholesky[component, start:stop, :stop]
                    total += (offsets[:, :stop] @ rows.T).square_().sum(dim=1)
                squares[component].index_copy_(0, block, total)

    def maximise(self, responsibilities):
        """M step. Raises CollapsedComponent."""
        first = self.responsibilities is None
        changes = responsibilities if first else responsibilities - self.responsibilities
        self.responsibilities = responsibilities
        self.totals = responsibilities.sum(dim=1) + TINY
        self.scale_change, self.mean_shift = torch.zeros_like(self.totals), torch.zeros_like(self.totals)
        for component, change in enumerate(changes):
            if first or change.any():
                self._add(component, change)
                self._factorise(component)

    def _add(self, component, change):
        """Add a change (N,) of responsibilities to the moments, or sum them anew where that is less work."""
        own = self.responsibilities[component]
        if 2 * change.count_nonzero() > own.count_nonzero():
            change = own
            self.origins[component] = self.points[own.argmax()]
            self.first_moments[component] = self.scatter_matrices[component] = 0
        for block in change.nonzero()[:, 0].split(BLOCK_POINTS):
            offsets = self.points.index_select(0, block).sub_(self.origins[component])
            weighted = offsets * change[block, None]
            self.first_moments[component] += weighted.sum(dim=0)
            for start, stop in self.chunks:
                rows = self.scatter_matrices[component, start:stop, :stop]
                rows.addmm_(weighted[:, start:stop].T, offsets[:, :stop])

    def _factorise(self, component):
        """Compute mean, Cholesky factor and its inverse from the moments."""
        total, origin, moment = self.totals[component], self.origins[component], self.first_moments[component]
        weight = total - TINY
        mean = (moment + weight * origin - TINY * self.centre) / total
        # From the scatter about the origin to that about the mean: − moved · halfᵀ − half · movedᵀ.
        moved = mean - origin
        half = moment - weight * moved / 2
        scatter = self.scatter_matrices[component].addr(moved, half, alpha=-1).addr_(half, moved, alpha=-1)
        covariance = scatter.div_(total)
        covariance.diagonal().add_(REGULARISATION)
        factor, failed = torch.linalg.cholesky_ex(covariance)  # of its lower triangle
        if failed:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")
        inverse = _inverse(factor)
        square = 0
        for start, stop in self.chunks:  # A − 1 = inverse · old factor − 1
            rows = inverse[start:stop, :stop] @ self.factors[component, :stop, :stop]
            rows.diagonal(start).sub_(1)
            square += rows.square_().sum()
        self.scale_change[component] = square.sqrt()
        self.mean_shift[component] = (inverse @ (mean - self.means[component])).norm()
        self.norms[component] = inverse.norm()
        self.means[component], self.factors[component], self.precisions_cholesky[component] = mean, factor, inverse


def _inverse(factor):
    """Inverse of a lower triangular (d, d), recursively by halves, which skips the zeros."""
    half = len(factor) // 2
    if half < 64:
        return torch.linalg.solve_triangular(factor, torch.eye(len(factor), dtype=factor.dtype), upper=False)
    inverse = torch.zeros_like(factor)
    inverse[:half, :half], inverse[half:, half:] = _inverse(factor[:half, :half]), _inverse(factor[half:, half:])
    inverse[half:, :half] = -inverse[half:, half:] @ (factor[half:, :half] @ inverse[:half, :half])
    return inverse


# --- bounds of distances


def coordinate_chunks(width):
    """[(start, stop)] of NUM_CHUNKS chunks of `width` coordinates."""
    stops = sorted({-(-width * chunk // NUM_CHUNKS) for chunk in range(1, NUM_CHUNKS + 1)})
    return list(zip([0, *stops], stops, strict=False))


def pca_rotation(points, least):
    """Orthogonal (d, d): principal directions of points (N, d) float64, in order of descending variance.

    A rotation keeps distances, and then the first few coordinates have most of them. Where a variance of `least` is
    lost in the rounding of the largest variance, whether Cholesky succeeds depends on rounding: then this is the
    identity, so that it matches fit_dense.
    """
    sample = points[:: 1 + len(points) // BLOCK_POINTS]
    variances, vectors = torch.linalg.eigh(torch.atleast_2d(torch.cov(sample.T, correction=0)))
    rounding = len(variances) * torch.finfo(points.dtype).eps * variances[-1]
    return vectors.flip(1) if rounding < least else torch.eye(len(variances), dtype=points.dtype)


def linear(points, matrix):
    """points (n, i) @ matrix (j, i).T, float32. By oneDNN, which takes half the time of BLAS on some processors."""
    if torch.backends.mkldnn.is_available() and torch.get_float32_matmul_precision() == "highest":
        return F.linear(points.to_mkldnn(), matrix.to_mkldnn()).to_dense()
    return points @ matrix.T


class DistanceBounds:
    """Bounds of the distances of N points to K components.

    likeliest: (N,) int64, the component with the greatest responsibility; own: (N,) float64, upper bounds of the
    distances to it; lower: (K, N) float32, lower bounds of the distances to all components.
    """

    def __init__(self, points, likeliest, count):
        """points: (N, d) float64 with a mean of 0; likeliest: (N,) int64; count: K."""
        self.points, self.chunks = points.float(), coordinate_chunks(points.shape[1])
        self.longest = self.points.norm(dim=1).max().double()
        self.likeliest, self.own = likeliest, torch.full_like(points[:, 0], torch.inf)
        self.lower = self.points.new_zeros(count, len(points))

    def loosen(self, scale_change, mean_shift):
        """Loosen all bounds after an M step: scale_change (K,) is ‖A − 1‖, mean_shift (K,) ‖mean_shift‖."""
        self.own.mul_((1 + scale_change)[self.likeliest]).add_(mean_shift[self.likeliest])
        factor, shift = (1 - 1e-5 - scale_change).float(), mean_shift.float()  # 1e-5 is more than float32 rounds off
        self.lower.mul_(factor[:, None]).sub_(shift[:, None]).clamp_(min=0)

    def thresholds(self, constants, negligible):
        """Squared distances (K, N) float32 from which on a log-probability is `negligible` below the likeliest's.

        A component's log-probability is its constants (K,) less half the squared distance. 0 for the likeliest itself.
        """
        own = self.own.square() - 2 * constants[self.likeliest]
        thresholds = own.float() + 2 * (constants + negligible).float()[:, None]
        return thresholds.clamp_(min=0).scatter_(0, self.likeliest[None], 0)

    def below(self, thresholds):
        """Whether (K, N) the squared distance may be below thresholds (K, N), by the bounds."""
        return self.lower < thresholds.sqrt()

    def bound_own(self, means, precisions_cholesky, norms, chosen):
        """Compute new bounds of the distances of `chosen` (N,) bool to their own components; rest: as in `tighten`."""
        margins = self._margins(means, norms)
        for component, (mean, matrix) in enumerate(zip(means.float(), precisions_cholesky.float(), strict=True)):
            for block in (chosen & (self.likeliest == component)).nonzero()[:, 0].split(BLOCK_POINTS):
                squares = matmul(self.points.index_select(0, block).sub_(mean), matrix.T).square_().sum(dim=1)
                self.own.index_copy_(0, block, squares.double().sqrt_().add_(margins[component]))

    def tighten(self, means, precisions_cholesky, norms, thresholds):
        """`below(thresholds)` after computing better bounds where the old ones do not exclude it.

        means: (K, d); precisions_cholesky: (K, d, d); norms: (K,) those of precisions_cholesky; all float64.
        """
        open_before, margins = self.below(thresholds), self._margins(means, norms).float()[:, None]
        enough = (thresholds.sqrt() + margins).square_()  # a sum of squares from which on the bound excludes it
        squares, still_below = torch.zeros_like(self.lower), torch.zeros_like(open_before)
        if 4 * len(means) <= means.shape[1] and open_before.sum() > PROJECTED_SHARE * open_before.numel():
            squares = self.project(means, precisions_cholesky)
        candidates = open_before & (squares < enough)
        for component, (mean, matrix) in enumerate(zip(means.float(), precisions_cholesky.float(), strict=True)):
            for block in candidates[component].nonzero()[:, 0].split(BLOCK_POINTS):
                total, needed = 0, enough[component].index_select(0, block)
                offsets = self.points.index_select(0, block).sub_(mean)
                for start, stop in self.chunks:
                    total = matmul(offsets[:, :stop], matrix[start:stop, :stop].T).square_().sum(dim=1).add_(total)
                    squares[component].index_copy_(0, block, total)
                    remaining = (total < needed).nonzero()[:, 0]
                    remain = (block, total, needed, offsets)
                    block, total, needed, offsets = (values.index_select(0, remaining) for values in remain)
                still_below[component].index_fill_(0, block, True)
        self.lower = torch.where(open_before, squares.sqrt_().sub_(margins), self.lower)
        return still_below

    def project(self, means, precisions_cholesky):
        """Lower bounds (K, N) of squared distances, computed for all points at once.

        They are the squared length of P · (point − mean) in the directions of P · (other mean − mean) alone.
        """
        directions = torch.linalg.qr(precisions_cholesky @ (means - means[:, None]).mT).Q  # (K, d, K)
        matrices = directions.mT @ precisions_cholesky  # (K, K, d)
        origins = (matrices @ means[:, :, None]).float().flatten()
        matrices, squares = matrices.float().flatten(0, 1), torch.empty_like(self.lower)
        for block, out in zip(self.points.split(PROJECTED_POINTS), squares.split(PROJECTED_POINTS, dim=1), strict=True):
            offsets = linear(block, matrices).sub_(origins)
            out.copy_(offsets.square_().view(len(block), *means.shape[:1], -1).sum(dim=2).T)
        return squares

    def _margins(self, means, norms):
        """(K,): twice the usual bound of how far rounding moves a float32 product; covers the sum of squares, too."""
        return 2 * (means.shape[1] + 8) * 2**-24 * norms * (self.longest + means.norm(dim=1))

    def update_own(self, likeliest, squares):
        """Set likeliest (N,), and its distances from squared distances (K, N), inf where they were not computed."""
        exact = squares.gather(0, likeliest[None])[0]
        self.likeliest, self.own = likeliest, torch.where(exact < torch.inf, exact.sqrt(), self.own)
