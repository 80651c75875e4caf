"""AP, Prec@k and precision-recall curves of rankings, averaged over classes, as the zero-shot protocols define them.

AP here is *interpolated* and its divisor counts the whole gallery; Prec@k divides by at most the gallery's size; both
are averaged over the queries of a class, then over classes. Other papers mean other things by the same names:
DEFINITIONS has theirs. Only the ranks of a query's relevant photos matter, so a ranking is kept as those. Stands alone.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

CACHE = 1 << 20  # bytes of keys sorted at a time on a CPU
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
    if scores.device.type == "cpu" and scores.dtype == torch.float32 and scores.numpy().min() >= 0:
        arrays = (values.numpy() for values in (scores, query_labels, gallery_labels))
        hits, near = map(torch.from_numpy, _rank_by_keys(*arrays, nearest))
    else:
        hits, near = _rank_by_order(scores, query_labels, gallery_labels, nearest)
    return Ranking(hits, in_gallery, scores.shape[1], near if nearest else None)


def _rank_by_order(scores, query_labels, gallery_labels, nearest):
    """(hits, nearest) by sorting the gallery: the plain way, of float64 and of a GPU."""
    order = scores.sort(dim=1, stable=True).indices
    query, place = (gallery_labels[order] == query_labels[:, None]).nonzero(as_tuple=True)
    counts = query.bincount(minlength=len(scores))
    number = torch.arange(len(query), device=query.device) - (counts.cumsum(0) - counts)[query]
    hits = torch.full((len(scores), int(counts.max())), torch.inf, dtype=torch.float64, device=scores.device)
    hits[query, number] = (place + 1).double()
    return hits, order[:, :nearest]


def _rank_by_keys(scores, query_labels, gallery_labels, nearest):
    """(hits, nearest) of float32 scores of 0 or more by sorting integers, several times as fast on a CPU.

    Such scores are in the order of their bits. So one integer of 64 bits holds all that counts: first the score but for
    its sign, then the photo's place in the gallery, which breaks ties, and at the end a 1 if the photo is not relevant.
    """
    photos = scores.shape[1]
    counts = np.bincount(gallery_labels, minlength=query_labels.max() + 1)
    hits = np.full((len(scores), counts[query_labels].max()), np.inf)
    near = np.empty((len(scores), nearest), np.int64)
    block = max(1, CACHE // (8 * photos))
    for label in np.unique(query_labels):
        rows = np.flatnonzero(query_labels == label)
        ends = np.arange(photos, dtype=np.uint64) << 1 | (gallery_labels != label)
        for part in np.split(rows, range(block, len(rows), block)):
            keys = scores[part].view(np.uint32).astype(np.uint64) << 33 | ends
            keys.sort(axis=1)
            ranks = np.flatnonzero(keys & 1 == 0) % photos + 1
            hits[part, : counts[label]] = ranks.reshape(len(part), -1)
            near[part] = (keys[:, :nearest] >> 1).astype(np.uint32)
    return hits, near


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


def plain_average_precision(ranking, top=None):
    """AP of each query without interpolation: the mean of the precisions at its relevant ranks r ≤ top.

    Unlike `average_precision`, it divides by the relevant photos among those ranks. Returns (Q,) float64; 0 where
    there are none.
    """
    hits = ranking.hits if top is None else torch.where(ranking.hits <= top, ranking.hits, torch.inf)
    found = hits.isfinite().sum(dim=1)
    return _precision(hits).sum(dim=1) / found.clamp(min=1)


def capped_precision_at(ranking, k):
    """Share of relevant photos among the first min(k, relevant in the gallery) ranks. Returns (Q,) float64."""
    cut = ranking.in_gallery.clamp(max=k)
    return (ranking.hits <= cut[:, None]).sum(dim=1).double() / cut.clamp(min=1)


METRICS = {
    "mAP": average_precision,
    "Prec": precision_at,
    "plain mAP": plain_average_precision,
    "capped Prec": capped_precision_at,
}
STANDARD = ("mAP@all", "mAP@200", "Prec@100", "Prec@200")  # what every results.json holds


class Definition(NamedTuple):
    """What papers mean by mAP and Prec."""

    average_precision: str  # of METRICS
    precision: str | None
    over_classes: bool  # the mean is over the queries of a class, then over classes; else over all queries


DEFINITIONS = {
    "SBKA, SAKE": Definition("mAP", "Prec", over_classes=True),
    "ZSE-SBIR": Definition("mAP", "capped Prec", over_classes=False),
    "SEM-PCYC": Definition("plain mAP", "Prec", over_classes=False),
    "torchmetrics": Definition("plain mAP", None, over_classes=False),
}
DEFINED = (*STANDARD, "plain mAP@all", "plain mAP@200", "capped Prec@100", "capped Prec@200")  # what they need


def by_definition(values, labels):
    """Each of STANDARD under all DEFINITIONS: {definition: {name: float}}.

    values: {name of DEFINED: (Q,) values of the queries}; labels: (Q,) their classes.
    """
    table = {}
    for name, definition in DEFINITIONS.items():
        table[name] = {}
        for standard in STANDARD:
            kind, _, cut = standard.partition("@")
            measure = definition.average_precision if kind == "mAP" else definition.precision
            if measure is not None:
                found = values[f"{measure}@{cut}"]
                mean = class_means(found, labels)[1].mean() if definition.over_classes else found.mean()
                table[name][standard] = mean.item()
    return table


def get_metric(name):
    """The metric of that name: a function of a Ranking that returns (Q,) float64, to be averaged over classes.

    name: one of METRICS, @ and the cut of the ranking; "all" is no cut. Raises ValueError for any other name.

    >>> ranking = rank(torch.tensor([[0.1, 0.2, 0.3]]), torch.tensor([1]), torch.tensor([1, 0, 1]))
    >>> metric("Prec@2")(ranking), metric("mAP@all")(ranking)
    (tensor([0.5000], dtype=torch.float64), tensor([0.8333], dtype=torch.float64))
    """
    kind, _, cut = name.partition("@")
    # A measure that has a default for its cut can do without one.
    uncut = [f"{known}@all" for known, measure in METRICS.items() if measure.__defaults__]
    if name in uncut:
        return METRICS[kind]
    if kind not in METRICS or not re.fullmatch("[1-9][0-9]*", cut):
        possible = ", ".join([*uncut, *(f"{known}@k" for known in METRICS)])
        raise ValueError(f"there is no metric {name!r}; there are {possible} with a whole number k from 1 on")
    return lambda ranking: METRICS[kind](ranking, int(cut))


def precision_at_recall(ranking):
    """Interpolated precision at the RECALL_LEVELS 0, 0.1, ..., 1: (Q, 11) float64; 0 where nothing is relevant."""
    if not ranking.hits.shape[1]:
        return ranking.hits.new_zeros(len(ranking.hits), len(RECALL_LEVELS))
    # The least number of hits that reaches a level; less a rounding, so that 0.3 · 10 is 3.
    needed = (RECALL_LEVELS.to(ranking.hits.device) * ranking.in_gallery[:, None] - 1e-9).ceil().long()
    return ranking.best_precision.gather(1, (needed - 1).clamp(min=0))


def _precision(hits):
    """Precision at each hit."""
    return torch.arange(1, hits.shape[1] + 1, dtype=torch.float64, device=hits.device) / hits


def _best_precision(hits):
    """Best precision at each hit or any later one."""
    precision = _precision(hits)
    return precision.flip(1).cummax(dim=1).values.flip(1) if hits.shape[1] else precision


def class_means(values, labels):
    """Mean of values (Q, ...) over the queries of each class: (classes that occur, ascending; their means, float64)."""
    classes, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), *values.shape[1:], dtype=torch.float64, device=values.device)
    sums.index_add_(0, index, values.double())
    return classes, sums / index.bincount(minlength=len(classes)).view(-1, *[1] * (values.ndim - 1))
