"""Exact top-k search over a remote store that answers filtered k-NN requests.

A request asks for the nearest photos in some cells. Photos that an answer leaves out are no nearer than the last photo
in it, which gives a lower bound of their scores. Cells are requested by ascending bound, several at a time, until no
photo that was left out can be among the k. The candidates are then scored with their features in float64.
"""

import numpy as np

from photo_search.cells import ROUNDING, Nearest, QueryState

MAX_PHOTOS_PER_REQUEST = 16_384  # the limit of Milvus, and at least the photos of a cell
MIN_FIRST_PHOTOS = 64  # of a cell in the first request for it
FIRST_ROUND_PHOTOS = 1024  # of all requests of the first round
REQUESTS_PER_ROUND = 4


def find_nearest_remote(cells, query, k, ask, fetch, weight, allowed=None):
    """The k photos with the lowest scores, ties by row, exactly as photo_search.cells.find_nearest.

    cells: Cells, of which only the arrays of cells are used; query: (D,) float32 of length 1.
    ask: a function of requests [(cells ascending, or None for all; number of photos), ...] that returns, for each,
    (rows, cells, squared distances) of at most that many photos, the nearest to the query, ascending.
    fetch: a function of rows that returns their (features (n, D), cells (n,)). allowed: the number of photos that the
    store searches in, None for all. Returns Nearest; its `projected` counts the photos in answers.
    Raises ValueError if answers have fewer photos than the index.
    """
    count = int(cells.cell_ends[-1]) if allowed is None else allowed
    state = _RemoteSearch(cells, query, min(k, count), weight, count)
    while requests := state.requests():
        for request, answer in zip(requests, ask(requests), strict=True):
            state.add_answer(request, *answer)
    return state.result(fetch)


class _RemoteSearch(QueryState):
    def __init__(self, cells, query, k, weight, count):
        super().__init__(cells, query, k, weight)
        self.count, self.received = count, 0
        self.limits = np.minimum(self.sizes, max(2 * k, MIN_FIRST_PHOTOS))  # what each cell is asked for
        self.wanted = max(2 * k, FIRST_ROUND_PHOTOS)
        # If D is not used, or few photos are allowed, one request for all cells is enough except for ties.
        self.whole = not weight or (count <= MAX_PHOTOS_PER_REQUEST and count < cells.cell_ends[-1])

    def requests(self):
        """The requests of the next round; none if the result is complete."""
        if self.whole:
            self.whole = False
            limit = MAX_PHOTOS_PER_REQUEST if self.weight else max(2 * self.k, MIN_FIRST_PHOTOS)
            return [(None, min(self.count, limit, MAX_PHOTOS_PER_REQUEST))]
        left = np.flatnonzero(self.bounds <= min(self.best, np.finfo(np.float32).max))
        left = left[np.argsort(self.bounds[left], kind="stable")]
        ends = self.limits[left].cumsum()
        requests, start, before = [], 0, 0
        while start < len(left) and before < self.wanted and len(requests) < REQUESTS_PER_ROUND:
            stop = max(
                start + 1, int(ends.searchsorted(min(before + MAX_PHOTOS_PER_REQUEST, self.wanted), side="right"))
            )
            requests.append((np.sort(left[start:stop]), int(ends[stop - 1] - before)))
            start, before = stop, ends[stop - 1]
        self.wanted *= 4
        return requests

    def add_answer(self, request, rows, numbers, squares):
        """Add the answer to a request: (n,) rows, their cells, and their squared distances, ascending."""
        chosen, limit = request
        chosen = np.arange(len(self.sizes)) if chosen is None else chosen
        self.received += len(rows)
        near, far = self.rounded(squares, 1), self.rounded(squares, -1)
        if len(rows) < limit or limit >= min(self.count, self.sizes[chosen].sum()):
            self.bounds[chosen] = np.inf
        else:
            self.bounds[chosen] = np.maximum(self.bounds[chosen], self.scores_from(near[-1], chosen))
            self.limits[chosen] = np.minimum(self.sizes[chosen], 4 * self.limits[chosen])
        lower_bounds = self.scores_from(near, numbers)
        upper_bounds = self.base[numbers] + self.distance_weight * far + ROUNDING
        new = (lower_bounds <= self.best) & ~np.isin(rows, self.rows)  # a second answer for a cell repeats the first
        self.add_candidates(rows[new], lower_bounds[new], upper_bounds[new])

    def result(self, fetch):
        """Score the candidates in float64: Nearest."""
        if len(self.rows) < self.k:
            raise ValueError(f"{len(self.rows):,} photos came where there are {self.k:,}")
        rows = np.sort(self.rows)
        features, numbers = fetch(rows)
        scores, distances, cluster = self.exact(features, self.cluster[numbers])
        order = np.argsort(scores, kind="stable")[: self.k]  # ties by row
        return Nearest(rows[order], scores[order], distances[order], cluster[order], len(rows), self.received)
