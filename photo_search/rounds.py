"""Exact search in features that are elsewhere, by rounds of questions to whoever holds them.

A question asks for the photos of some cells that are nearest to the sketch. Photos that did not come are no nearer than
the last one that did, which bounds their scores from below. Cells come by ascending bound, several at once, until
no photo that did not come can be among the k; those that came are within rounding of their places, and their features
decide. Stands on photo_search.cells.
"""

import numpy as np

from photo_search.cells import CLUSTER_WEIGHT, ROUNDING, Nearest, QueryState

MAX_PHOTOS_PER_REQUEST = 16_384  # photos that a question may ask for: what Milvus allows, and no less than a cell has
MIN_FIRST_PHOTOS = 64  # photos that a cell is asked for at first, at least
FIRST_ROUND_PHOTOS = 1024  # photos that the first round asks for, at least
REQUESTS_PER_ROUND = 4  # questions of a round


def search(cells, query, k, ask, fetch, weight=CLUSTER_WEIGHT, allowed=None):
    """The k photos with the lowest scores, ties by row: as photo_search.cells.search gives them.

    cells: Cells, of which what belongs to photos is not used; query: (D,) float32 of length 1.
    ask: a function of a list of (cells ascending, or None for all; number of photos) that gives, for each of these,
    (rows, cells, squared distances) of that many photos nearest to the query, ascending, or of all there are.
    fetch: a function of rows that gives their (features (n, D), cells (n,)). allowed: how many photos may be found,
    where that is not all of them. Returns Nearest, whose `projected` counts the photos that came.
    Raises ValueError if fewer photos come than there are.
    """
    count = int(cells.cell_ends[-1]) if allowed is None else allowed
    rounds = _RemoteSearch(cells, query, min(k, count), weight, count)
    while questions := rounds.questions():
        for question, answer in zip(questions, ask(questions), strict=True):
            rounds.take(question, *answer)
    return rounds.result(fetch)


class _RemoteSearch(QueryState):
    def __init__(self, cells, query, k, weight, count):
        super().__init__(cells, query, k, weight)
        self.count, self.came = count, 0
        self.limits = np.minimum(self.sizes, max(2 * k, MIN_FIRST_PHOTOS))  # what each cell is asked for
        self.wanted = max(2 * k, FIRST_ROUND_PHOTOS)
        # Where all cells are alike, or few photos may be found, one question is enough but for ties.
        self.whole = not weight or (count <= MAX_PHOTOS_PER_REQUEST and count < cells.cell_ends[-1])

    def questions(self):
        """The questions of the next round; none if nothing is left to ask."""
        if self.whole:
            self.whole = False
            return [
                (
                    None,
                    min(
                        self.count,
                        MAX_PHOTOS_PER_REQUEST if self.weight else max(2 * self.k, MIN_FIRST_PHOTOS),
                        MAX_PHOTOS_PER_REQUEST,
                    ),
                )
            ]
        left = np.flatnonzero(self.bounds <= min(self.best, np.finfo(np.float32).max))
        left = left[np.argsort(self.bounds[left], kind="stable")]
        ends = self.limits[left].cumsum()
        questions, start, before = [], 0, 0
        while start < len(left) and before < self.wanted and len(questions) < REQUESTS_PER_ROUND:
            stop = max(
                start + 1, int(ends.searchsorted(min(before + MAX_PHOTOS_PER_REQUEST, self.wanted), side="right"))
            )
            questions.append((np.sort(left[start:stop]), int(ends[stop - 1] - before)))
            start, before = stop, ends[stop - 1]
        self.wanted *= 4
        return questions

    def take(self, question, rows, numbers, squares):
        """Take the answer to a question."""
        chosen, limit = question
        chosen = np.arange(len(self.sizes)) if chosen is None else chosen
        self.came += len(rows)
        near, far = self.rounded(squares, 1), self.rounded(squares, -1)
        if len(rows) < limit or limit >= min(self.count, self.sizes[chosen].sum()):
            self.bounds[chosen] = np.inf
        else:
            self.bounds[chosen] = np.maximum(self.bounds[chosen], self.scores_from(near[-1], chosen))
            self.limits[chosen] = np.minimum(self.sizes[chosen], 4 * self.limits[chosen])
        lower_bounds, upper_bounds = self.scores_from(near, numbers), self.base[numbers] + self.rest * far + ROUNDING
        new = (lower_bounds <= self.best) & ~np.isin(
            rows, self.rows
        )  # a cell that is asked again gives what it gave before
        self.keep(rows[new], lower_bounds[new], upper_bounds[new])

    def result(self, fetch):
        """Score what is left in float64."""
        if len(self.rows) < self.k:
            raise ValueError(f"{len(self.rows):,} photos came where there are {self.k:,}")
        rows = np.sort(self.rows)
        scores, distances, cluster = self.exact(*fetch(rows))
        order = np.argsort(scores, kind="stable")[: self.k]  # ties by row
        return Nearest(rows[order], scores[order], distances[order], cluster[order], len(rows), self.came)
