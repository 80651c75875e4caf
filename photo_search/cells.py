"""Exact search in millions of features: photos stand sorted by cell, and bounds tell which cells can be left out.

A feature has an outline: its coordinates in a few directions, and the length of its rest. That of a sketch q and of a
photo g are never further apart than d = ‖q − g‖, and cost a twelfth.

A cell holds photos with the same codes, so they share the cluster distance D to a sketch. Their outlines lie in a ball,
so that d is at least the distance to the ball's centre less its radius. Cells come by ascending 0.8 · D + 0.2 · (bound
of d), and the search stops where that exceeds the k-th best score so far. Inside a cell each photo's outline tells
whether it can be left out.

Bounds are float32 and allow for its rounding; what they leave is scored in float64, as models.eval.matching defines
it. Features have length 1. Stands alone, on NumPy and threadpoolctl.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

CLUSTER_WEIGHT = 0.8  # as in models.eval.matching
PCA_DIRECTIONS = 63  # of an outline
BLOCK = 8192  # features at a time
GROUP = 8 * BLOCK  # photos of cells that are looked at together
GATHER_SHARE = 0.25  # share of features that is gathered rather than read through
SCAN_SHARE = 0.25  # share of photos that is read through rather than cell by cell
ROUNDING = 4e-6  # rounding of a score in float32


@dataclass(frozen=True)
class Cells:
    """Photos sorted by cell. N photos of D values, C cells, codes in M sub-spaces."""

    features: np.ndarray  # (N, D) float32, of length 1
    path_order: np.ndarray  # (N,) int32, which decides ties: the lower comes first
    codebook: np.ndarray  # (M, K, D/M) float32; M is 0 without one
    codes: np.ndarray  # (C, M) int32
    cell_ends: np.ndarray  # (C,) int64, where each cell ends
    centres: np.ndarray  # (C, P + 1) float32, of the balls around the outlines of each cell
    radii: np.ndarray  # (C,) float32
    pca_basis: np.ndarray  # (P, D) float32, orthonormal
    pca_projection: np.ndarray  # (N, P + 1) float32


class Nearest(NamedTuple):
    """The k photos with the lowest scores, ascending."""

    rows: np.ndarray  # (k,) int64
    scores: np.ndarray  # (k,) float64
    distances: np.ndarray  # (k,) float64, d
    cluster_distances: np.ndarray  # (k,) float64, D; NaN without a codebook
    scanned: int  # photos whose features were looked at
    projected: int  # photos whose outlines were looked at


def assign_codes(features, codebook):
    """The nearest code word of each part of features (N, D), as matching.nearest_codes gives it: (N, M) int32."""
    codes = np.empty((len(features), len(codebook)), np.int32)
    means = codebook.astype(np.float64)
    for start in range(0, len(features) if len(codebook) else 0, BLOCK):
        block = np.asarray(features[start : start + BLOCK], np.float64)
        for part, (values, words) in enumerate(zip(np.split(block, len(means), axis=1), means, strict=True)):
            # ‖g‖² is the same for all words.
            codes[start : start + BLOCK, part] = ((words**2).sum(axis=1) - 2 * values @ words.T).argmin(axis=1)
    return codes


def sort_by_cell(codes):
    """The order of photos by their codes (N, M), and then as they are: (permutation (N,), codes (C, M), ends (C,)).

    A cell has at most BLOCK photos; larger ones are cut.
    """
    permutation = np.lexsort(codes.T[::-1]) if codes.shape[1] else np.arange(len(codes))
    codes = codes[permutation]
    starts = np.flatnonzero(np.append(True, (codes[1:] != codes[:-1]).any(axis=1)))
    ends = np.append(starts[1:], len(codes))
    ends = np.concatenate([np.append(np.arange(a + BLOCK, b, BLOCK), b) for a, b in zip(starts, ends, strict=True)])
    return permutation, codes[ends - 1], ends.astype(np.int64)


def bounding_spheres(outlines, ends):
    """(centres, radii) of Cells."""
    centres, radii = np.empty((len(ends), outlines.shape[1]), np.float32), np.empty(len(ends), np.float32)
    for cells in _blocks(ends):
        start = ends[cells.start - 1] if cells.start else 0
        block = outlines[start : ends[cells.stop - 1]].astype(np.float64)
        sizes = np.diff(ends[cells], prepend=start)
        starts = ends[cells] - sizes - start
        centres[cells] = np.add.reduceat(block, starts) / sizes[:, None]
        apart = np.sqrt(((block - np.repeat(centres[cells], sizes, axis=0)) ** 2).sum(axis=1))
        radii[cells] = np.nextafter(np.maximum.reduceat(apart, starts).astype(np.float32), np.float32(np.inf))
    return centres, radii


def fit_pca_basis(features):
    """The directions (P, D) float32 that hold most of features (n, D)."""
    _, vectors = np.linalg.eigh(features.T.astype(np.float64) @ features)
    return np.ascontiguousarray(vectors[:, ::-1][:, :PCA_DIRECTIONS].T.astype(np.float32))


def project_features(features, basis):
    """Outlines (n, P + 1) float32 of features (n, D)."""
    inside = features @ basis.T
    rest = np.sqrt(np.clip((features**2).sum(axis=1) - (inside**2).sum(axis=1), 0, None))
    return np.concatenate([inside, rest[:, None]], axis=1)


def search(cells, query, k, weight=CLUSTER_WEIGHT, allowed=None):
    """The k photos with the lowest weight · D + (1 − weight) · d, ties by place: as comparing all of them gives.

    query: (D,) float32 of length 1; weight 0 is one-to-one matching, any other needs a codebook.
    allowed: (N,) bool, the rows that may be found, one at least; None for all. Returns Nearest.
    Raises ValueError if features are not finite.
    """
    count = len(cells.features) if allowed is None else int(allowed.sum())
    # Waiting for each other in every product, as BLAS's own threads do, takes longer than the product.
    with _blas().limit(limits=1, user_api="blas"):
        return _search(_LocalSearch(cells, query, min(k, count), weight, allowed), cells)


def _search(scan, cells):
    order = np.argsort(scan.bounds, kind="stable")
    bounds, counts = scan.bounds[order], scan.sizes[order].cumsum()
    done, wanted = 0, max(2 * scan.k, 1024)
    while done < (within := bounds.searchsorted(scan.best, side="right")):
        before = counts[done - 1] if done else 0
        if done and counts[within - 1] - before > SCAN_SHARE * len(cells.features):
            scan.scan_all(order[done:within])
            break
        stop = min(within, counts.searchsorted(before + wanted) + 1)
        scan.add(np.sort(order[done:stop]))
        done, wanted = stop, min(4 * wanted, GROUP)
    return scan.result()


class QueryState:
    """A sketch in search of its k nearest photos. best: no photo with a higher score can be among them.

    cells: Cells, of which this takes what belongs to cells, and nothing that belongs to photos; query: (D,) float32.
    """

    def __init__(self, cells, query, k, weight):
        self.cells, self.k = cells, k
        self.query = np.ascontiguousarray(query, np.float32)
        self.projection = project_features(self.query[None], cells.pca_basis)[0]
        self.weight, self.rest = weight, round(1 - weight, 12)
        self.sizes = np.diff(cells.cell_ends, prepend=0)
        # A product of D terms may be off by D roundings of numbers that add up to 1 at most.
        self.margin = 4 * (len(query) + 8) * 2.0**-24
        self.cluster = _cluster_distances(cells, self.query)
        self.base = (weight * self.cluster if weight else np.zeros(len(cells.cell_ends))).astype(np.float32)
        self.bounds = self.scores_from(self._least_distances())
        self.best = np.inf
        self.rows, self.lower_bounds, self.upper_bounds = (
            np.empty(0, np.int64),
            np.empty(0, np.float32),
            np.empty(0, np.float32),
        )

    def _least_distances(self):
        """What no photo of each cell is nearer than: (C,)."""
        apart = np.sqrt(((self.cells.centres - self.projection) ** 2).sum(axis=1))
        return np.sqrt(np.maximum(np.maximum(apart - self.cells.radii, 0) ** 2 - self.margin, 0))

    def scores_from(self, distances, chosen=slice(None)):
        """What scores in cells `chosen` are at least, where d is at least `distances`."""
        return self.base[chosen] + self.rest * distances - ROUNDING

    def keep(self, rows, lower_bounds, upper_bounds):
        """Keep photos that may be among the k; their scores are at least `lower_bounds`, and at most `upper_bounds`."""
        self.rows, self.lower_bounds = np.append(self.rows, rows), np.append(self.lower_bounds, lower_bounds)
        self.upper_bounds = np.append(self.upper_bounds, upper_bounds)
        if len(self.upper_bounds) >= self.k:
            self.best = np.partition(self.upper_bounds, self.k - 1)[self.k - 1]
            kept = self.lower_bounds <= self.best
            self.rows, self.lower_bounds, self.upper_bounds = (
                self.rows[kept],
                self.lower_bounds[kept],
                self.upper_bounds[kept],
            )

    def rounded(self, squares, sign):
        """d of squared distances, less (sign 1) or more (sign −1) what rounding may have done."""
        return np.sqrt(np.maximum(squares - np.float32(sign * self.margin), 0))

    def exact(self, features, numbers):
        """(scores, d, D), float64, of photos with these features (n, D), which are in the cells `numbers`."""
        difference = features.astype(np.float64) - self.query.astype(np.float64)
        distances = np.sqrt((difference**2).sum(axis=1))
        cluster = self.cluster[numbers]
        return (self.weight * cluster + self.rest * distances if self.weight else distances), distances, cluster


class _LocalSearch(QueryState):
    """A search in features that are at hand."""

    def __init__(self, cells, query, k, weight, allowed):
        super().__init__(cells, query, k, weight)
        self.allowed = allowed
        if allowed is not None:
            self.bounds[~np.logical_or.reduceat(allowed, cells.cell_ends - self.sizes)] = np.inf
        self.scanned, self.projected = 0, 0

    def add(self, chosen):
        """Look at the photos of cells `chosen`, ascending, cell by cell."""
        ends, sizes = self.cells.cell_ends[chosen], self.sizes[chosen]
        rows = np.repeat(ends - sizes.cumsum(), sizes) + np.arange(sizes.sum())
        base, runs = self._among(np.repeat(self.base[chosen], sizes), rows), _joined(ends - sizes, ends)
        if self.best < np.inf:
            self.projected += len(rows)
            kept = np.flatnonzero(self._score_bounds(base, runs) <= self.best)
            if len(kept) < GATHER_SHARE * len(rows):
                rows, base, runs = rows[kept], base[kept], None
        self._score(rows, base, runs)

    def scan_all(self, chosen):
        """Look at the photos of cells `chosen`, reading through all outlines: faster where they are many."""
        base = np.full(len(self.base), np.inf, np.float32)
        base[chosen] = self.base[chosen]
        base = self._among(np.repeat(base, self.sizes), slice(None))
        parts = [(start, min(start + GROUP, len(base))) for start in range(0, len(base), GROUP)]
        lower_bounds = np.concatenate(
            list(_threads().map(lambda part: self._score_bounds(base[slice(*part)], [part]), parts))
        )
        self.projected += len(lower_bounds)
        first = np.argpartition(lower_bounds, min(16 * self.k, len(lower_bounds) - 1))[: 16 * self.k]
        first.sort()
        self._score(first, base[first])  # which lowers `best` for all the others
        lower_bounds[first] = np.inf
        kept = np.flatnonzero(lower_bounds <= self.best)
        if len(kept) < GATHER_SHARE * len(lower_bounds):
            for start in range(0, len(kept), BLOCK):
                self._score(kept[start : start + BLOCK], base[kept[start : start + BLOCK]])
            return
        base[lower_bounds > self.best] = np.inf
        products = _threads().map(lambda part: _products(self.cells.features, self.query, [part]), parts)
        for (start, end), product in zip(parts, products, strict=True):
            self._settle(np.arange(start, end), base[start:end], product)

    def _among(self, base, rows):
        """Changes `base` of the rows that may not be found to infinity, so that no score of theirs is low enough."""
        if self.allowed is not None:
            base[~self.allowed[rows]] = np.inf
        return base

    def _score_bounds(self, base, runs):
        """What the scores of photos are at least, by their outlines. runs: (start, end); base: weight · D of each."""
        return (
            base
            + self.rest * self._distances(_products(self.cells.pca_projection, self.projection, runs), 1)
            - ROUNDING
        )

    def _score(self, rows, base, runs=None):
        """Look at the features of photos `rows`, which are those in `runs`, if that is given."""
        features = self.cells.features
        self._settle(rows, base, _products(features, self.query, runs) if runs else features[rows] @ self.query)

    def _settle(self, rows, base, products):
        """Keep those of `rows` that may be among the k, by their products with the query."""
        self.scanned += len(rows)
        lower_bounds = base + self.rest * self._distances(products, 1) - ROUNDING
        kept = np.flatnonzero(lower_bounds <= self.best)
        kept = kept[np.isfinite(base[kept])]
        upper_bounds = base[kept] + self.rest * self._distances(products[kept], -1) + ROUNDING
        self.keep(rows[kept], lower_bounds[kept], upper_bounds)

    def _distances(self, products, sign):
        return self.rounded(2 - 2 * products, sign)

    def result(self):
        """Score what is left in float64. Raises ValueError if features are not finite."""
        if len(self.rows) < self.k:
            raise ValueError("features are not finite")
        parts = [self._exact(self.rows[start : start + BLOCK]) for start in range(0, len(self.rows), BLOCK)]
        scores, distances, cluster = (np.concatenate(values) for values in zip(*parts, strict=True))
        order = np.lexsort([self.cells.path_order[self.rows], scores])[: self.k]
        values = (values[order] for values in (self.rows, scores, distances, cluster))
        return Nearest(*values, self.scanned, self.projected)

    def _exact(self, rows):
        return self.exact(self.cells.features[rows], self.cells.cell_ends.searchsorted(rows, side="right"))


@functools.cache
def _blas():
    return ThreadpoolController()


@functools.cache
def _threads():
    return ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())


def _cluster_distances(cells, query):
    """D of each cell, (C,) float64; NaN without a codebook."""
    if not len(cells.codebook):
        return np.full(len(cells.cell_ends), np.nan)
    parts = query.astype(np.float64).reshape(len(cells.codebook), 1, -1)
    squares = ((cells.codebook - parts) ** 2).sum(axis=2)
    return sum(own[codes] for own, codes in zip(squares, cells.codes.T, strict=True))


def _products(features, query, runs):
    """features · query for the rows of each run (start, end), one after the other."""
    if len(runs) == 1:
        return features[slice(*runs[0])] @ query
    products, done = np.empty(sum(end - start for start, end in runs), np.float32), 0
    for start, end in runs:
        np.dot(features[start:end], query, out=products[done : done + end - start])
        done += end - start
    return products


def _joined(starts, ends):
    """[(start, end), ...] of runs of photos, ascending, those that touch as one."""
    apart = np.flatnonzero(starts[1:] != ends[:-1])
    return list(zip(starts[np.append(0, apart + 1)].tolist(), ends[np.append(apart, -1)].tolist(), strict=True))


def _blocks(ends, size=BLOCK):
    """Yield slices of cells, which end after `ends` photos, with about `size` photos each."""
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(ends.searchsorted(before + size, side="right")))
        yield slice(first, last)
        first = last
