"""Exact top-k search in millions of features: cells with bounding spheres and PCA projections give lower bounds.

Each feature is projected on PCA_DIRECTIONS principal directions plus the norm of the residual. The distance of two
projections is at most d = ‖q − g‖ of their features, and costs a twelfth.

Photos are sorted by cell. A cell contains photos with the same codes, which therefore share the cluster distance D to a
query. A bounding sphere around the projections of a cell gives a lower bound of d. The search visits cells by ascending
weight · D + (1 − weight) · (bound of d), and stops once that exceeds the k-th best score so far. In a cell, the
projection of each photo gives a closer bound.

Photos that were added since the cells were made are the tail: they have codes, but belong to no cell, and a search
compares the query with each of them. Photos that were removed have no rank in the order of paths.

Bounds are float32 and allow for its rounding; the remaining photos are scored in float64, as models.eval.matching
defines the score. Features have length 1. Needs NumPy and threadpoolctl.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from utils.process_pool import available_cores

PCA_DIRECTIONS = 63
BLOCK_FEATURES = 8192  # features at a time, and photos of a cell at most
GROUP = 8 * BLOCK_FEATURES  # photos of the cells that are visited together, at most
GATHER_SHARE = 0.25  # below this share of the rows, index them; above it, read all contiguously
SCAN_SHARE = 0.25  # above this share of all photos, read all projections instead of cell by cell
ROUNDING = 4e-6  # bound of the rounding error of a score in float32


@dataclass(frozen=True)
class Cells:
    """Photos sorted by cell. N photos of D values, C cells, P principal directions, codes in M subspaces.

    The T photos of the tail are numbered from N on.
    """

    features: np.ndarray  # (N, D) float32, of length 1
    path_order: np.ndarray  # (N + T,) int32, rank of the path of each photo, which breaks ties; -1 if it was removed
    codebook: np.ndarray  # (M, K, D/M) float32; M is 0 without one
    codes: np.ndarray  # (C, M) int32
    cell_ends: np.ndarray  # (C,) int64, end of each cell in the order of the photos
    centres: np.ndarray  # (C, P + 1) float32, of the bounding sphere of the projections of each cell
    radii: np.ndarray  # (C,) float32, of the bounding spheres
    pca_basis: np.ndarray  # (P, D) float32, orthonormal
    pca_projection: np.ndarray  # (N, P + 1) float32
    tail_features: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.float32))  # (T, D)
    tail_codes: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))  # (T, M)

    @functools.cached_property
    def not_removed(self):
        """(N + T,) bool; None if no photo was removed."""
        kept = self.path_order >= 0
        return None if kept.all() else kept

    def features_of(self, rows):
        """Features (n, D) of photos (n,)."""
        if not len(self.tail_features):
            return self.features[rows]
        features, in_tail = np.empty((len(rows), self.features.shape[1]), np.float32), rows >= len(self.features)
        features[~in_tail] = self.features[rows[~in_tail]]
        features[in_tail] = self.tail_features[rows[in_tail] - len(self.features)]
        return features


class Nearest(NamedTuple):
    """The k photos with the lowest scores, ascending."""

    rows: np.ndarray  # (k,) int64
    scores: np.ndarray  # (k,) float64
    distances: np.ndarray  # (k,) float64, d
    cluster_distances: np.ndarray  # (k,) float64, D; NaN without a codebook
    scanned: int  # photos with a feature that was read
    projected: int  # photos with a projection that was read


def assign_codes(features, codebook):
    """The nearest codebook entry in each subspace of features (N, D), as matching.nearest_codes: (N, M) int32."""
    codes = np.empty((len(features), len(codebook)), np.int32)
    means = codebook.astype(np.float64)
    for start in range(0, len(features) if len(codebook) else 0, BLOCK_FEATURES):
        block = np.asarray(features[start : start + BLOCK_FEATURES], np.float64)
        for part, (values, words) in enumerate(zip(np.split(block, len(means), axis=1), means, strict=True)):
            # ‖g‖² is the same for all words.
            codes[start : start + BLOCK_FEATURES, part] = ((words**2).sum(axis=1) - 2 * values @ words.T).argmin(axis=1)
    return codes


def sort_by_cell(codes):
    """Sort photos by their codes (N, M), stably: (permutation (N,), codes (C, M), cell ends (C,)).

    A cell has at most BLOCK photos; larger ones are split.
    """
    permutation = np.lexsort(codes.T[::-1]) if codes.shape[1] else np.arange(len(codes))
    codes = codes[permutation]
    starts = np.flatnonzero(np.append(True, (codes[1:] != codes[:-1]).any(axis=1)))
    ends = np.append(starts[1:], len(codes))
    ends = np.concatenate(
        [np.append(np.arange(a + BLOCK_FEATURES, b, BLOCK_FEATURES), b) for a, b in zip(starts, ends, strict=True)]
    )
    return permutation, codes[ends - 1], ends.astype(np.int64)


def bounding_spheres(projections, ends):
    """(centres (C, P + 1), radii (C,)) of spheres around the projections (N, P + 1) of each cell."""
    centres, radii = np.empty((len(ends), projections.shape[1]), np.float32), np.empty(len(ends), np.float32)
    for cells in _blocks(ends):
        start = ends[cells.start - 1] if cells.start else 0
        block = projections[start : ends[cells.stop - 1]].astype(np.float64)
        sizes = np.diff(ends[cells], prepend=start)
        starts = ends[cells] - sizes - start
        centres[cells] = np.add.reduceat(block, starts) / sizes[:, None]
        distances = np.sqrt(((block - np.repeat(centres[cells], sizes, axis=0)) ** 2).sum(axis=1))
        radii[cells] = np.nextafter(np.maximum.reduceat(distances, starts).astype(np.float32), np.float32(np.inf))
    return centres, radii


def fit_pca_basis(features):
    """The principal directions (P, D) float32 of features (n, D), uncentred."""
    _, vectors = np.linalg.eigh(features.T.astype(np.float64) @ features)
    return np.ascontiguousarray(vectors[:, ::-1][:, :PCA_DIRECTIONS].T.astype(np.float32))


def project_features(features, pca_basis):
    """Coordinates on the principal directions and the norm of the residual, (n, P + 1) float32, of features (n, D)."""
    coordinates = features @ pca_basis.T
    residual = np.sqrt(np.clip((features**2).sum(axis=1) - (coordinates**2).sum(axis=1), 0, None))
    return np.concatenate([coordinates, residual[:, None]], axis=1)


def merge_path_order(sorted_order, places, names, removed):
    """Ranks of the paths of N photos and T photos of the tail without the `removed`: (N + T,) int32, -1 for those.

    sorted_order: (N,) ranks of the N photos; places: (T,) how many of these come before a photo of the tail; names:
    [T paths as bytes]; removed: numbers of photos.
    """
    tail = sorted(range(len(places)), key=lambda number: (places[number], names[number]))
    before = np.bincount(places, minlength=len(sorted_order) + 1).cumsum()  # photos of the tail before the N photos
    order = np.empty(len(sorted_order) + len(places), np.int32)
    order[: len(sorted_order)] = sorted_order + before[sorted_order]
    order[len(sorted_order) :][tail] = places[tail] + np.arange(len(tail))
    kept = np.ones(len(order), bool)
    kept[order[removed]] = False  # by rank
    return np.where(kept, kept.cumsum() - 1, -1)[order].astype(np.int32)


def with_tail_cells(cells):
    """(Cells that have cells for the tail after all others, number of the cell of each photo of the tail (T,)).

    A cell has photos of the same codes, and BLOCK_FEATURES of them at most. Further photos do not change these numbers.
    The spheres of these cells bound nothing. Arrays of photos stay as they are.
    """
    found, occurrences, numbers = {}, {}, np.empty(len(cells.tail_codes), np.int64)
    for place, code in enumerate(map(tuple, cells.tail_codes.tolist())):
        count = occurrences[code] = occurrences.get(code, -1) + 1
        numbers[place] = found.setdefault((code, count // BLOCK_FEATURES), len(found))
    if not found:
        return cells, numbers
    ends = cells.cell_ends[-1] + np.bincount(numbers).cumsum()
    codes = np.array([code for code, _ in found], np.int32).reshape(len(found), -1)
    centres = np.zeros((len(found), cells.centres.shape[1]), np.float32)
    table = dataclasses.replace(
        cells, codes=np.concatenate([cells.codes, codes]), cell_ends=np.append(cells.cell_ends, ends),
        centres=np.concatenate([cells.centres, centres]),
        radii=np.append(cells.radii, np.full(len(found), 4, np.float32)),
    )  # fmt: skip
    return table, numbers + len(cells.cell_ends)


def find_nearest(cells, query, k, weight, allowed=None):
    """The k photos with the lowest weight · D + (1 − weight) · d, exactly as comparing all of them; ties by path.

    query: (D,) float32 of length 1; weight: 0 is one-to-one matching, any other needs a codebook.
    allowed: (N + T,) bool, the rows to search in, at least one that is not removed; None for all. Returns Nearest.
    Raises ValueError if features are not finite.
    """
    if cells.not_removed is not None:
        allowed = cells.not_removed if allowed is None else allowed & cells.not_removed
    count = len(cells.path_order) if allowed is None else int(allowed.sum())
    # BLAS threads would wait for each other longer than a product takes. Damaged features may overflow.
    with _blas().limit(limits=1, user_api="blas"), np.errstate(all="ignore"):
        return _find_nearest(_LocalSearch(cells, query, min(k, count), weight, allowed), cells)


def _find_nearest(scan, cells):
    if len(cells.tail_features):
        scan.add_tail()
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
    """State of a top-k query. best: an upper bound of the k-th best score.

    cells: Cells, of which only the arrays of cells are used, not those of photos; query: (D,) float32.
    """

    def __init__(self, cells, query, k, weight):
        self.cells, self.k = cells, k
        self.query = np.ascontiguousarray(query, np.float32)
        self.projection = project_features(self.query[None], cells.pca_basis)[0]
        self.weight, self.distance_weight = weight, round(1 - weight, 12)
        self.sizes = np.diff(cells.cell_ends, prepend=0)
        # The rounding error of a product of D terms is at most D roundings of numbers with a sum of at most 1.
        self.margin = 4 * (len(query) + 8) * 2.0**-24
        self.cluster = _cluster_distances(cells.codebook, cells.codes, self.query)
        self.base = (weight * self.cluster if weight else np.zeros(len(cells.cell_ends))).astype(np.float32)
        self.bounds = self.scores_from(self._least_distances())
        self.best = np.inf
        self.rows, self.lower_bounds, self.upper_bounds = (
            np.empty(0, np.int64),
            np.empty(0, np.float32),
            np.empty(0, np.float32),
        )

    def _least_distances(self):
        """Lower bounds of d for the photos of each cell: (C,)."""
        distances = np.sqrt(((self.cells.centres - self.projection) ** 2).sum(axis=1))
        return np.sqrt(np.maximum(np.maximum(distances - self.cells.radii, 0) ** 2 - self.margin, 0))

    def scores_from(self, distances, chosen=slice(None)):
        """Lower bounds of the scores in cells `chosen`, given lower bounds `distances` of d."""
        return self.base[chosen] + self.distance_weight * distances - ROUNDING

    def add_candidates(self, rows, lower_bounds, upper_bounds):
        """Add candidates with bounds of their scores, and drop those that cannot be among the k."""
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
        """d of squared distances: a lower bound (sign 1) or an upper bound (sign −1), given their rounding errors."""
        return np.sqrt(np.maximum(squares - np.float32(sign * self.margin), 0))

    def exact(self, features, cluster):
        """(scores, d, D), float64, of photos with these features (n, D) and D (n,)."""
        difference = features.astype(np.float64) - self.query.astype(np.float64)
        distances = np.sqrt((difference**2).sum(axis=1))
        scores = self.weight * cluster + self.distance_weight * distances if self.weight else distances
        return scores, distances, cluster


class _LocalSearch(QueryState):
    """A query in the arrays of an index on disk."""

    def __init__(self, cells, query, k, weight, allowed):
        super().__init__(cells, query, k, weight)
        self.allowed = allowed
        if allowed is not None:
            starts = cells.cell_ends - self.sizes
            self.bounds[~np.logical_or.reduceat(allowed[: len(cells.features)], starts)] = np.inf
        self.tail_cluster = _cluster_distances(cells.codebook, cells.tail_codes, self.query)
        self.scanned, self.projected = 0, 0

    def add_tail(self):
        """Visit the photos of the tail."""
        count, tail = len(self.cells.features), self.cells.tail_features
        base = (self.weight * self.tail_cluster if self.weight else np.zeros(len(tail))).astype(np.float32)
        rows = np.arange(count, count + len(tail))
        self._keep_promising(rows, self._mask_disallowed(base, rows), tail @ self.query)

    def add(self, chosen):
        """Visit the photos of cells `chosen`, ascending, cell by cell."""
        ends, sizes = self.cells.cell_ends[chosen], self.sizes[chosen]
        rows = np.repeat(ends - sizes.cumsum(), sizes) + np.arange(sizes.sum())
        base, runs = self._mask_disallowed(np.repeat(self.base[chosen], sizes), rows), _merge_runs(ends - sizes, ends)
        if self.best < np.inf:
            self.projected += len(rows)
            kept = np.flatnonzero(self._projected_bounds(base, runs) <= self.best)
            if len(kept) < GATHER_SHARE * len(rows):
                rows, base, runs = rows[kept], base[kept], None
        self._score(rows, base, runs)

    def scan_all(self, chosen):
        """Visit the photos of cells `chosen`, reading all projections contiguously: faster if there are many."""
        base = np.full(len(self.base), np.inf, np.float32)
        base[chosen] = self.base[chosen]
        base = self._mask_disallowed(np.repeat(base, self.sizes), slice(len(self.cells.features)))
        parts = [(start, min(start + GROUP, len(base))) for start in range(0, len(base), GROUP)]
        lower_bounds = np.concatenate(
            list(_threads().map(lambda part: self._projected_bounds(base[slice(*part)], [part]), parts))
        )
        self.projected += len(lower_bounds)
        first = np.argpartition(lower_bounds, min(16 * self.k, len(lower_bounds) - 1))[: 16 * self.k]
        first.sort()
        self._score(first, base[first])  # lowers `best` for all the others
        lower_bounds[first] = np.inf
        kept = np.flatnonzero(lower_bounds <= self.best)
        if len(kept) < GATHER_SHARE * len(lower_bounds):
            for start in range(0, len(kept), BLOCK_FEATURES):
                self._score(kept[start : start + BLOCK_FEATURES], base[kept[start : start + BLOCK_FEATURES]])
            return
        base[lower_bounds > self.best] = np.inf
        products = _threads().map(lambda part: _products(self.cells.features, self.query, [part]), parts)
        for (start, end), product in zip(parts, products, strict=True):
            self._keep_promising(np.arange(start, end), base[start:end], product)

    def _mask_disallowed(self, base, rows):
        """Sets `base` of the rows that are not allowed to infinity, in place."""
        if self.allowed is not None:
            base[~self.allowed[rows]] = np.inf
        return base

    def _projected_bounds(self, base, runs):
        """Lower bounds of scores by projections. runs: [(start, end), ...] of rows; base: weight · D of each row."""
        return (
            base
            + self.distance_weight * self._distances(_products(self.cells.pca_projection, self.projection, runs), 1)
            - ROUNDING
        )

    def _score(self, rows, base, runs=None):
        """Read the features of photos `rows`; runs: the same rows as [(start, end), ...], if they are contiguous."""
        features = self.cells.features
        self._keep_promising(rows, base, _products(features, self.query, runs) if runs else features[rows] @ self.query)

    def _keep_promising(self, rows, base, products):
        """Keep those of `rows` that may be among the k, by the products of their features with the query."""
        self.scanned += len(rows)
        lower_bounds = base + self.distance_weight * self._distances(products, 1) - ROUNDING
        kept = np.flatnonzero(lower_bounds <= self.best)
        kept = kept[np.isfinite(base[kept])]
        upper_bounds = base[kept] + self.distance_weight * self._distances(products[kept], -1) + ROUNDING
        self.add_candidates(rows[kept], lower_bounds[kept], upper_bounds)

    def _distances(self, products, sign):
        return self.rounded(2 - 2 * products, sign)

    def result(self):
        """Score the candidates in float64. Raises ValueError if features are not finite."""
        if len(self.rows) < self.k:
            raise ValueError("features are not finite")
        parts = [
            self._exact(self.rows[start : start + BLOCK_FEATURES]) for start in range(0, len(self.rows), BLOCK_FEATURES)
        ]
        scores, distances, cluster = (np.concatenate(values) for values in zip(*parts, strict=True))
        order = np.lexsort([self.cells.path_order[self.rows], scores])[: self.k]
        values = (values[order] for values in (self.rows, scores, distances, cluster))
        return Nearest(*values, self.scanned, self.projected)

    def _exact(self, rows):
        # Those of the tail come after the last cell.
        numbers = self.cells.cell_ends.searchsorted(rows, side="right") + np.maximum(rows - len(self.cells.features), 0)
        return self.exact(self.cells.features_of(rows), np.append(self.cluster, self.tail_cluster)[numbers])


@functools.cache
def _blas():
    return ThreadpoolController()


@functools.cache
def _threads():
    return ThreadPoolExecutor(available_cores())


def _cluster_distances(codebook, codes, query):
    """D of cells or photos with codes (n, M): (n,) float64; NaN without a codebook."""
    if not len(codebook) or not len(codes):
        return np.full(len(codes), np.nan)
    parts = query.astype(np.float64).reshape(len(codebook), 1, -1)
    squares = ((codebook - parts) ** 2).sum(axis=2)
    return sum(own[each] for own, each in zip(squares, codes.T, strict=True))


def _products(features, query, runs):
    """features · query for the rows of each run (start, end), one after the other."""
    if len(runs) == 1:
        return features[slice(*runs[0])] @ query
    products, done = np.empty(sum(end - start for start, end in runs), np.float32), 0
    for start, end in runs:
        np.dot(features[start:end], query, out=products[done : done + end - start])
        done += end - start
    return products


def _merge_runs(starts, ends):
    """[(start, end), ...] of ascending runs of photos, adjacent runs merged."""
    gaps = np.flatnonzero(starts[1:] != ends[:-1])
    return list(zip(starts[np.append(0, gaps + 1)].tolist(), ends[np.append(gaps, -1)].tolist(), strict=True))


def _blocks(ends, size=BLOCK_FEATURES):
    """Yield slices of cells, which end after `ends` photos, with about `size` photos each."""
    first = 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(ends.searchsorted(before + size, side="right")))
        yield slice(first, last)
        first = last
