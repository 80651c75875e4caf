"""Bounds of the distances of points to the components of a Gaussian mixture, which tell what need not be computed.

A component has a mean and a root, the inverse of its covariance's Cholesky factor; the distance of a point to it is the
length of root · (point − mean). Two facts bound it:

- The root is lower triangular: its first p rows give the length in the first p coordinates, which is no greater.
- A step of EM takes y = root · (point − mean) to A · y + shift. So the distance ‖y‖ changes by at most
  ‖A − 1‖ · ‖y‖ + ‖shift‖, and an old bound less that is still a bound.

Bounds are float32 and allow for its rounding. Stands alone.
"""

import torch

STEPS = 4  # in which all coordinates are taken
BLOCK = 4096  # points at a time: bounds the memory, fits a cache


def steps_of(width):
    """[(start, stop)], the parts in which `width` coordinates are taken."""
    stops = sorted({-(-width * step // STEPS) for step in range(1, STEPS + 1)})
    return list(zip([0, *stops], stops, strict=False))


def directions(points, least):
    """Orthogonal (d, d): directions of points (N, d) float64, those of most variance first.

    Turned points keep their distances, and their first few coordinates tell most of them. Where a variance of `least`
    is lost in the rounding of the largest one, nothing is turned: that a covariance can be factorised is chance then,
    and must be the same chance as without a screen.
    """
    some = points[:: 1 + len(points) // BLOCK]
    variances, vectors = torch.linalg.eigh(torch.atleast_2d(torch.cov(some.T, correction=0)))
    rounding = len(variances) * torch.finfo(points.dtype).eps * variances[-1]
    return vectors.flip(1) if rounding < least else torch.eye(len(variances), dtype=points.dtype)


class Screen:
    """What is known of the distances of N points to K components without computing them.

    likeliest: (N,) int64, the component that each point belongs to most; own: (N,) float64, upper bounds of the
    distances to it; bounds: (K, N) float32, lower bounds of the distances to all components.
    """

    def __init__(self, points, likeliest, count):
        """points: (N, d) float64 with a mean of 0; likeliest: (N,) int64; count: K."""
        self.points, self.steps = points.float(), steps_of(points.shape[1])
        self.longest = self.points.norm(dim=1).max().double()
        self.likeliest, self.own = likeliest, torch.full_like(points[:, 0], torch.inf)
        self.bounds = self.points.new_zeros(count, len(points))

    def age(self, drifts, shifts):
        """Allow for a step of EM: drifts (K,) are ‖A − 1‖, shifts (K,) ‖shift‖. 1e-5 is for rounding, with room."""
        self.own.mul_((1 + drifts)[self.likeliest]).add_(shifts[self.likeliest])
        kept, lost = (1 - 1e-5 - drifts).float(), shifts.float()
        self.bounds.mul_(kept[:, None]).sub_(lost[:, None]).clamp_(min=0)

    def limits(self, constants, negligible):
        """Squared distances (K, N) float32 from which on a log-probability is `negligible` below the likeliest's.

        A component's log-probability is its constants (K,) less half the squared distance. 0 for the likeliest itself.
        """
        own = self.own.square() - 2 * constants[self.likeliest]
        limits = own.float() + 2 * (constants + negligible).float()[:, None]
        return limits.clamp_(min=0).scatter_(0, self.likeliest[None], 0)

    def near(self, limits):
        """Whether (K, N) the bounds leave it open that the squared distance is below limits (K, N)."""
        return self.bounds < limits.sqrt()

    def survivors(self, means, roots, norms, limits):
        """Like near(limits), but with renewed bounds where the old ones leave it open.

        means: (K, d); roots: (K, d, d); norms: (K,) those of roots; all float64.
        """
        near = self.near(limits)
        # Twice the usual bound of a product's rounding in float32: room for that of the sum of squares.
        margins = 2 * (means.shape[1] + 8) * 2**-24 * norms * (self.longest + means.norm(dim=1))
        margins = margins.float()[:, None]
        enough = (limits.sqrt() + margins).square_()  # a sum of squares from which on the bound is above the limit
        squares, survived = torch.zeros_like(self.bounds), torch.zeros_like(near)
        for component, (mean, root) in enumerate(zip(means.float(), roots.float(), strict=True)):
            for part in near[component].nonzero()[:, 0].split(BLOCK):
                found, needed = 0, enough[component].index_select(0, part)
                for start, stop in self.steps:
                    offsets = self.points[:, :stop].index_select(0, part).sub_(mean[:stop])
                    found = (offsets @ root[start:stop, :stop].T).square_().sum(dim=1).add_(found)
                    squares[component].index_copy_(0, part, found)
                    kept = (found < needed).nonzero()[:, 0]
                    part, found, needed = (values.index_select(0, kept) for values in (part, found, needed))
                survived[component].index_fill_(0, part, True)
        self.bounds = torch.where(near, squares.sqrt_().sub_(margins), self.bounds)
        return survived

    def settle(self, likeliest, squares):
        """Keep what an E step found: likeliest (N,); squared distances (K, N), inf where they were not computed."""
        exact = squares.gather(0, likeliest[None])[0]
        self.likeliest, self.own = likeliest, torch.where(exact < torch.inf, exact.sqrt(), self.own)
