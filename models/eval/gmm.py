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
bits of every sum. models.eval.distance_bounds has the bounds. Depends on NumPy, SciPy and PyTorch.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import lapack

from models.eval.codebooks import CollapsedComponent
from models.eval.distance_bounds import BLOCK_POINTS, DistanceBounds, coordinate_chunks, pca_rotation
from models.eval.matching import matmul

TOLERANCE, REGULARISATION, ITERATIONS = 1e-3, 1e-6, 100  # scikit-learn's defaults
TINY = 10 * torch.finfo(torch.float64).eps  # what scikit-learn adds to a component's total, so that none is 0
DENSE_BYTES = 1 << 27  # largest matrix in an iteration of fit_dense
# A responsibility is negligible if N of them would be NEGLIGIBLE of the component's total: a tenth of its last bit. If
# an E step leaves less than WEAK of a component's total, they could move it: then all distances are computed.
NEGLIGIBLE, WEAK = torch.finfo(torch.float64).eps / 10, 1e-3


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
    negligible = components.negligible()
    shared = old > negligible[:, None]
    ambiguous = shared.sum(dim=0) > 1
    shared &= ambiguous
    stale = bounds.below(bounds.thresholds(constants, -negligible.log())).any(dim=0)
    components.compute(squares, shared)
    bounds.update_own(likeliest, squares)

    # Find the other components that matter to stale points.
    current = components.means, components.precisions_cholesky, components.norms
    bounds.bound_own(*current, stale & ~ambiguous)
    thresholds = bounds.thresholds(constants, -negligible.log()).masked_fill_(shared, 0)
    candidates = bounds.tighten(*current, thresholds)
    newly_ambiguous = candidates.any(dim=0) & ~ambiguous
    components.compute(squares, candidates.scatter_(0, likeliest[None], newly_ambiguous[None]))
    ambiguous |= newly_ambiguous

    responsibilities, log_likelihood = _replace_ambiguous(old, constants, squares, ambiguous)
    if (responsibilities.sum(dim=1) < WEAK * components.totals).any():
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
                    total += matmul(offsets[:, :stop], rows.T).square_().sum(dim=1)
                squares[component].index_copy_(0, block, total)

    def negligible(self):
        """(K,): responsibilities up to these are negligible, see NEGLIGIBLE."""
        return NEGLIGIBLE / len(self.points) * self.totals

    def maximise(self, responsibilities):
        """M step. Leaves out negligible changes of responsibilities. Raises CollapsedComponent."""
        first, changes = self.responsibilities is None, responsibilities
        if not first:
            changes = responsibilities - self.responsibilities
            changes.masked_fill_(changes.abs() <= self.negligible()[:, None], 0)
            responsibilities = torch.where(changes == 0, self.responsibilities, responsibilities)
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
                rows += matmul(weighted[:, start:stop].T, offsets[:, :stop])

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
        # The lower triangle in NumPy's order of memory is the upper one in LAPACK's, and upper.T @ upper = covariance.
        upper, failed = lapack.dpotrf(covariance.T.numpy(), lower=False, overwrite_a=True)
        if failed:
            raise CollapsedComponent(f"component {component} collapsed onto too few photos")
        factor, inverse = torch.from_numpy(upper.T), torch.zeros_like(covariance)
        _invert(factor.numpy(), inverse.numpy())
        square = 0
        for start, stop in self.chunks:  # A − 1 = inverse · old factor − 1
            rows = matmul(inverse[start:stop, :stop], self.factors[component, :stop, :stop])
            rows.diagonal(start).sub_(1)
            square += rows.square_().sum()
        self.scale_change[component] = square.sqrt()
        self.mean_shift[component] = (inverse @ (mean - self.means[component])).norm()
        self.norms[component] = inverse.norm()
        self.means[component], self.factors[component], self.precisions_cholesky[component] = mean, factor, inverse


def _invert(factor, inverse):
    """Write the inverse of a lower triangular array (d, d) over zeros, recursively by halves, which skips the zeros."""
    half = len(factor) // 2
    if half < 48:
        inverse[:] = lapack.dtrtri(factor.T, lower=False)[0].T
        return
    upper, lower = slice(half), slice(half, None)
    _invert(factor[upper, upper], inverse[upper, upper])
    _invert(factor[lower, lower], inverse[lower, lower])
    np.matmul(-inverse[lower, lower], factor[lower, upper] @ inverse[upper, upper], out=inverse[lower, upper])
