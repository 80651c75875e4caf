"""AP, Prec@k and precision-recall curves of rankings, averaged over classes, as the zero-shot protocols define them.

AP here is *interpolated* and its divisor counts the whole gallery; Prec@k divides by at most the gallery's size; both
are averaged over the queries of a class, then over classes. Other tools mean other things by the same names.
Only the ranks of a query's relevant photos matter, so a ranking is kept as those. Stands alone.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

CACHE = 1 << 20  # bytes of scores sorted at a time on a CPU
MANY_TIES = 32  # of a sketch, above which its gallery is put in order rather than searched for each
RECALL_LEVELS = torch.linspace(0, 1, 11, dtype=torch.float64)


@dataclass(frozen=True)
class Ranking:
    """Where each query's relevant photos stand among N, nearest first, ties by gallery order."""

    hits: torch.Tensor  # (Q, R) float64, ascending ranks from 1; inf where a query has fewer than R
    in_gallery: torch.Tensor  # (Q,) int64, relevant photos
    gallery_size: int
    nearest: torch.Tensor | None  # (Q, k) int64, the k nearest photos in order, if they were asked for

    @cached_property
    def best_precision(self):
        """Best precision at each hit or any later one: (Q, R) float64, 0 where hits are inf."""
        return _best_precision(self.hits)


def rank(scores, query_labels, gallery_labels, nearest=0):
    """Rank each query's gallery by ascending score, ties by gallery order.

    scores: (Q, N) float32 or float64, finite; labels: (Q,) and (N,) int64 from 0; nearest: how many of the nearest
    photos to name. Returns a Ranking.
    """
    in_gallery = gallery_labels.bincount(minlength=int(query_labels.max()) + 1)[query_labels]
    nearest = min(nearest, scores.shape[1])
    if scores.device.type == "cpu" and scores.numpy().min() >= 0:
        arrays = (values.numpy() for values in (scores, query_labels, gallery_labels))
        hits, near = map(torch.from_numpy, _rank_by_keys(*arrays, nearest))
    else:
        hits, near = _rank_by_order(scores, query_labels, gallery_labels, nearest)
    return Ranking(hits, in_gallery, scores.shape[1], near if nearest else None)


def _rank_by_order(scores, query_labels, gallery_labels, nearest):
    """(hits, nearest) by sorting the gallery: the plain way, and a GPU's."""
    order = scores.sort(dim=1, stable=True).indices
    query, place = (gallery_labels[order] == query_labels[:, None]).nonzero(as_tuple=True)
    counts = query.bincount(minlength=len(scores))
    number = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    hits = torch.full((len(scores), int(counts.max())), torch.inf, dtype=torch.float64, device=scores.device)
    hits[query, number] = (place + 1).double()
    return hits, order[:, :nearest]


def _rank_by_keys(scores, query_labels, gallery_labels, nearest):
    """(hits, nearest) by sorting values alone, several times as fast on a CPU.

    A score of 0 or more leaves its sign bit free. Moved to the other end, it says which photos are not relevant, so
    the sorted keys tell the ranks of those that are.
    """
    unsigned = {4: np.uint32, 8: np.uint64}[scores.itemsize]
    counts = np.bincount(gallery_labels, minlength=query_labels.max() + 1)
    hits = np.full((len(scores), counts[query_labels].max()), np.inf)
    near = np.empty((len(scores), nearest), np.int64)
    block = max(1, CACHE // (scores.shape[1] * scores.itemsize))
    buffer = np.empty((block, scores.shape[1]), unsigned)
    for label in np.unique(query_labels):
        rows, relevant = np.flatnonzero(query_labels == label), gallery_labels == label
        irrelevant = (~relevant).astype(unsigned)
        for part in np.split(rows, range(block, len(rows), block)):
            together = part[-1] - part[0] == len(part) - 1
            own, keys = scores[part[0] : part[-1] + 1] if together else scores[part], buffer[: len(part)]
            np.left_shift(own.view(unsigned), 1, out=keys)
            keys |= irrelevant
            keys.sort(axis=1)
            places = np.flatnonzero(keys & 1 == 0).reshape(len(part), -1)
            places -= np.arange(len(part))[:, None] * keys.shape[1]
            _break_ties(places, keys, own, relevant)
            hits[part, : places.shape[1]] = places + 1
            if nearest:
                limits = (keys[:, nearest - 1] >> 1).view(own.dtype)
                near[part] = [_nearest(one, limit, nearest) for one, limit in zip(own, limits, strict=True)]
    return hits, near


def _break_ties(places, keys, scores, relevant):
    """Correct, in place, the places of relevant photos that tie with others: sorted keys have them first."""
    every = np.arange(len(keys))[:, None]
    following = keys[every, np.minimum(places + 1, keys.shape[1] - 1)]
    # The last relevant photo of each tie.
    rows, last = _nonzero(following == keys[every, places] + 1)
    many = np.bincount(rows, minlength=len(keys)) > MANY_TIES
    for row in np.flatnonzero(many):
        places[row] = np.flatnonzero(relevant[_order(scores[row])])
    rows, last = rows[~many[rows]], last[~many[rows]]
    values = (keys[rows, places[rows, last]] >> 1).view(scores.dtype)
    members = [np.flatnonzero(scores[row] == value) for row, value in zip(rows, values, strict=True)]
    photo, tie = np.concatenate([*members, rows[:0]]), np.repeat(np.arange(len(rows)), list(map(len, members)))
    starts = tie.searchsorted(np.arange(len(rows)))  # ties are in order
    within = (np.arange(len(tie)) - starts[tie])[relevant[photo]]
    tie = tie[relevant[photo]]
    counts = np.bincount(tie, minlength=len(rows))
    first = last + 1 - counts
    number = first[tie] + np.arange(len(tie)) - (counts.cumsum() - counts)[tie]
    places[rows[tie], number] = places[rows, first][tie] + within


def _order(scores):
    """scores.argsort(kind="stable") of scores (N,), 0 or more; of float32 by sorting scores joined to places."""
    if scores.dtype != np.float32:
        return scores.argsort(kind="stable")
    keys = scores.view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys |= np.arange(len(scores), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def _nonzero(mask):
    """np.nonzero of a matrix, several times as fast."""
    return np.divmod(np.flatnonzero(mask), mask.shape[1])


def _nearest(scores, limit, count):
    found = np.flatnonzero(scores <= limit)
    return found[scores[found].argsort(kind="stable")[:count]]


def average_precision(ranking, top=None):
    """Interpolated AP of each query: (1/R) · sum over relevant ranks r ≤ n of the best precision at r..n.

    top: cut n of the ranking, None for all of it. R is the number of relevant photos in the whole gallery, at most n.
    Returns (Q,) float64; NaN where nothing in the gallery is relevant.

    >>> ranking = rank(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([1]), torch.tensor([0, 1, 1, 0]))
    >>> average_precision(ranking)    # precisions at the hits: 1/2, 2/3
    tensor([0.6667], dtype=torch.float64)
    """
    if top is None:
        return ranking.best_precision.sum(dim=1) / ranking.in_gallery
    hits = ranking.hits[:, :top]
    hits = torch.where(hits <= top, hits, torch.inf)
    return (_best_precision(hits) * (hits <= top)).sum(dim=1) / ranking.in_gallery.clamp(max=top)


def precision_at(ranking, k):
    """Share of relevant photos among the first min(k, N) ranks. Returns (Q,) float64.

    >>> precision_at(rank(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([1]), torch.tensor([1, 0, 1])), k=2)
    tensor([0.5000], dtype=torch.float64)
    """
    return (ranking.hits[:, :k] <= k).sum(dim=1).double() / min(k, ranking.gallery_size)


def precision_at_recall(ranking):
    """Interpolated precision at the RECALL_LEVELS 0, 0.1, ..., 1: (Q, 11) float64; 0 where nothing is relevant."""
    if not ranking.hits.shape[1]:
        return ranking.hits.new_zeros(len(ranking.hits), len(RECALL_LEVELS))
    # The least number of hits that reaches a level; less a rounding, so that 0.3 · 10 is 3.
    needed = (RECALL_LEVELS.to(ranking.hits.device) * ranking.in_gallery[:, None] - 1e-9).ceil().long()
    return ranking.best_precision.gather(1, (needed - 1).clamp(min=0))


def _best_precision(hits):
    """Best precision at each hit or any later one."""
    precision = torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device) / hits
    return precision.flip(1).cummax(dim=1).values.flip(1) if hits.shape[1] else precision


MEASURES = {"mAP": average_precision, "Prec": precision_at}
STANDARD = ("mAP@all", "mAP@200", "Prec@100", "Prec@200")


def metric(name):
    kind, _, cut = name.partition("@")
    return lambda ranking: MEASURES[kind](ranking, None if cut == "all" else int(cut))


def class_means(values, labels):
    """Mean of values (Q, ...) over the queries of each class: (classes that occur, ascending; their means, float64)."""
    classes, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), *values.shape[1:], dtype=torch.float64, device=values.device)
    sums.index_add_(0, index, values.double())
    return classes, sums / index.bincount(minlength=len(classes)).view(-1, *[1] * (values.ndim - 1))
