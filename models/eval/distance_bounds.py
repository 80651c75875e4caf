"""Bounds of the Mahalanobis distances between points and the components of a mixture, for models.eval.gmm.

The distance of a point to a component is ‖P · (point − mean)‖, where P is the inverse of the covariance's lower
Cholesky factor (`precisions_cholesky`). Three facts bound it:

- P is lower triangular: its first p rows give the distance in the first p coordinates, which is no greater.
- The length of P · (point − mean) in any one direction is no greater.
- An EM step takes y = P · (point − mean) to A · y + mean_shift. So ‖y‖ changes by at most ‖A − 1‖ · ‖y‖ + ‖mean_shift‖,
  and an old bound less that is still a bound.

Bounds are float32 and allow for its rounding. Depends on NumPy and PyTorch.
"""

import torch

from models.eval.matching import matmul

NUM_CHUNKS = 4  # coordinate chunks of a distance
PROJECTED_SHARE = 0.1  # share of distances whose bounds prove nothing, above which projections are computed first
BLOCK_POINTS = 4096  # points at a time: bounds the memory, fits a cache


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


class DistanceBounds:
    """Bounds of the distances of N points to K components.

    likeliest: (N,) int64, the component with the greatest responsibility; own: (N,) float64, upper bounds of the
    distances to it; lower: (K, N) float32, lower bounds of the distances to all components.
    """

    def __init__(self, points, likeliest, count):
        """points: (N, d) float64 with a mean of 0; likeliest: (N,) int64; count: K."""
        self.points, chunks = points.float(), coordinate_chunks(points.shape[1])
        self.buffer = self.points.new_empty(min(BLOCK_POINTS, len(points)) * points.shape[1])
        # After each stage of a distance, points are left out of which it proves enough: half of the coordinates, then
        # one chunk at a time.
        self.chunks, half = chunks, (len(chunks) + 1) // 2
        self.stages = [chunks[:half], *([chunk] for chunk in chunks[half:])]
        self.longest = self.points.norm(dim=1).max().double()
        self.likeliest, self.own = likeliest, torch.full_like(points[:, 0], torch.inf)
        self.lower = self.points.new_zeros(count, len(points))

    def loosen(self, scale_change, mean_shift):
        """Loosen all bounds after an M step: scale_change (K,) is ‖A − 1‖, mean_shift (K,) ‖mean_shift‖."""
        self.own.mul_((1 + scale_change)[self.likeliest]).add_(mean_shift[self.likeliest])
        factor, shift = (1 - 1e-5 - scale_change).float(), mean_shift.float()  # 1e-5 is more than float32 rounds off
        self.lower.mul_(factor[:, None]).sub_(shift[:, None]).clamp_(min=0)

    def thresholds(self, constants, negligible):
        """Squared distances (K, N) float32 from which on a log-probability is `negligible` (K,) below the likeliest's.

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
        for component, (mean, matrix) in enumerate(zip(means.float(), precisions_cholesky, strict=True)):
            matrix = matrix.float()
            for block in (chosen & (self.likeliest == component)).nonzero()[:, 0].split(BLOCK_POINTS):
                squares = self._squares(block, mean, matrix, self.chunks)
                self.own.index_copy_(0, block, squares.double().sqrt_().add_(margins[component]))

    def tighten(self, means, precisions_cholesky, norms, thresholds):
        """`below(thresholds)` after computing better bounds where the old ones do not exclude it.

        means: (K, d); precisions_cholesky: (K, d, d); norms: (K,) those of precisions_cholesky; all float64.
        """
        open_before, margins = self.below(thresholds), self._margins(means, norms).float()[:, None]
        enough = (thresholds.sqrt() + margins).square_()  # a sum of squares from which on the bound excludes it
        squares, still_below = torch.zeros_like(self.lower), torch.zeros_like(open_before)
        if open_before.sum() > PROJECTED_SHARE * open_before.numel():
            squares = self.project(means, precisions_cholesky)
        candidates = open_before & (squares < enough)
        for component, (mean, matrix) in enumerate(zip(means.float(), precisions_cholesky, strict=True)):
            matrix = matrix.float()
            for block in candidates[component].nonzero()[:, 0].split(BLOCK_POINTS):
                total, needed = 0, enough[component].index_select(0, block)
                for stage in self.stages:
                    total = self._squares(block, mean, matrix, stage) + total
                    squares[component].index_copy_(0, block, total)
                    remaining = (total < needed).nonzero()[:, 0]
                    block, total, needed = (values.index_select(0, remaining) for values in (block, total, needed))
                still_below[component].index_fill_(0, block, True)
        self.lower = torch.where(open_before, squares.sqrt_().sub_(margins), self.lower)
        return still_below

    def project(self, means, precisions_cholesky):
        """Lower bounds (K, N) of squared distances: the squared length of P · (point − mean) in one direction.

        It is that of P · (other mean − mean), where the other mean is that of the point's likeliest component.
        """
        directions = matmul(precisions_cholesky, (means - means[:, None]).mT)  # (K, d, K)
        directions /= directions.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(directions.dtype).tiny)
        rows = matmul(precisions_cholesky.mT, directions)
        origins = (rows * means[:, :, None]).sum(dim=1).float()
        rows, squares = rows.float(), torch.empty_like(self.lower.T)
        for other in range(len(means)):
            for block in (self.likeliest == other).nonzero()[:, 0].split(BLOCK_POINTS):
                lengths = matmul(self._gather(block, len(rows[0])), rows[:, :, other].T)
                squares.index_copy_(0, block, lengths.sub_(origins[:, other]).square_())
        return squares.T.contiguous()

    def _squares(self, block, mean, matrix, chunks):
        """Squared distances of points `block` in the coordinates of consecutive `chunks`."""
        offsets, total = self._gather(block, chunks[-1][1]), 0
        offsets -= mean[: offsets.shape[1]]
        for start, stop in chunks:  # skips the zeros of the triangular matrix
            rows = matmul(offsets[:, :stop], matrix[start:stop, :stop].T)
            total = torch.linalg.vector_norm(rows, dim=1).square_().add_(total)
        return total

    def _gather(self, block, width):
        """The first `width` coordinates of points `block`, which the next call overwrites."""
        out = self.buffer[: len(block) * width].view(len(block), width)
        return torch.index_select(self.points[:, :width], 0, block, out=out)

    def _margins(self, means, norms):
        """(K,): twice the usual bound of how far rounding moves a float32 product; covers the sum of squares, too."""
        return 2 * (means.shape[1] + 8) * 2**-24 * norms * (self.longest + means.norm(dim=1))

    def update_own(self, likeliest, squares):
        """Set likeliest (N,), and its distances from squared distances (K, N), inf where they were not computed."""
        exact = squares.gather(0, likeliest[None])[0]
        self.likeliest, self.own = likeliest, torch.where(exact < torch.inf, exact.sqrt(), self.own)
