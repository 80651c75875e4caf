"""AP, Prec@k, Recall@k and precision-recall curves of rankings, and their averages, as zero-shot protocols define them.

AP here is *interpolated* and its divisor counts the whole gallery; Prec@k divides by at most the gallery's size; both
are averaged over the queries of a class, then over classes. Other papers mean other things by the same names:
DEFINITIONS has theirs. What is relevant to a query is given by `SameClass` or `ListedPhotos`. All metrics need only the
ranks of a query's relevant photos, so a Ranking holds those. Depends on NumPy and PyTorch alone.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

SORT_BYTES = 1 << 20  # keys sorted at a time on a CPU, so that they fit its cache
INFINITY = 0x7F800000  # its bits in float32: those of negative scores and of NaN are greater
RECALL_LEVELS = torch.linspace(0, 1, 11, dtype=torch.float64)


class SameClass:
    """Relevance by class: a photo is relevant to the queries of its class, as in the zero-shot benchmarks.

    query_labels: (Q,), gallery_labels: (N,), both int64 from 0. A class may be on one side only.
    """

    def __init__(self, query_labels, gallery_labels):
        self.query_labels, self.gallery_labels = query_labels, gallery_labels

    def __getitem__(self, queries):
        """The relevance for some queries, an index (n,) int64."""
        return SameClass(self.query_labels[queries], self.gallery_labels)

    def to(self, device):
        """The same on `device`."""
        return SameClass(self.query_labels.to(device), self.gallery_labels.to(device))

    def counts(self):
        """Relevant photos of each query: (Q,) int64."""
        return self.gallery_labels.bincount(minlength=int(self.query_labels.max()) + 1)[self.query_labels]

    def mask(self):
        """Whether each photo is relevant to each query: (Q, N) bool."""
        return self.gallery_labels == self.query_labels[:, None]

    def groups(self):
        """Yield (queries (n,) int64, their mask (N,) bool) for queries that share their relevant photos."""
        for label in self.query_labels.unique():
            yield (self.query_labels == label).nonzero()[:, 0], self.gallery_labels == label

    def grouped(self):
        """All queries, (Q,) int64, those that share their relevant photos one after the other."""
        return self.query_labels.argsort(stable=True)


class ListedPhotos:
    """Relevance by list: each query has its own relevant photos, for instance one in instance-level retrieval.

    photos: Q sequences of indices into a gallery of `gallery_size` photos. Methods are those of SameClass.
    """

    def __init__(self, photos, gallery_size, device="cpu"):
        self.photos = [torch.as_tensor(each, dtype=torch.int64).unique() for each in photos]
        self.gallery_size, self.device = gallery_size, device

    def __getitem__(self, queries):
        return ListedPhotos([self.photos[query] for query in queries.tolist()], self.gallery_size, self.device)

    def to(self, device):
        return ListedPhotos(self.photos, self.gallery_size, device)

    def counts(self):
        return torch.tensor([len(each) for each in self.photos], device=self.device)

    def mask(self):
        mask = torch.zeros(len(self.photos), self.gallery_size, dtype=torch.bool)
        for row, each in zip(mask, self.photos, strict=True):
            row[each] = True
        return mask.to(self.device)

    def groups(self):
        for query in range(len(self.photos)):
            index = torch.tensor([query])
            yield index, self[index].mask()[0]

    def grouped(self):
        return torch.arange(len(self.photos))


@dataclass(frozen=True)
class Ranking:
    """Ranks of each query's relevant photos among N, nearest first, ties by gallery order."""

    hits: torch.Tensor  # (Q, R) float64, ascending ranks from 1; inf where a query has fewer than R relevant photos
    in_gallery: torch.Tensor  # (Q,) int64, number of relevant photos
    gallery_size: int
    nearest: torch.Tensor | None = None  # (Q, k) int64, the k nearest photos in order, if they were asked for

    @cached_property
    def precision(self):
        """Precision at each hit: (Q, R) float64, 0 where hits are inf."""
        return torch.arange(1, self.hits.shape[1] + 1, dtype=torch.float64, device=self.hits.device) / self.hits

    @cached_property
    def best_precision(self):
        """Best precision at each hit or any later one: (Q, R) float64, 0 where hits are inf."""
        return _best_at_or_after(self.precision)

    def precision_until(self, top):
        """Precision at the hits among the first `top` ranks: (Q, at most `top`) float64, 0 at later hits."""
        return torch.where(self.hits[:, :top] <= top, self.precision[:, :top], 0)

    def nearest_relevant(self):
        """Whether each of the nearest photos is relevant: (Q, k) bool."""
        count = self.nearest.shape[1]
        relevant = torch.zeros(len(self.hits), count + 1, dtype=torch.bool, device=self.hits.device)
        return relevant.scatter_(1, self.hits.clamp(max=count + 1).long() - 1, True)[:, :count]


def rank(scores, relevance, nearest=0):
    """Rank each query's gallery by ascending score, ties by gallery order.

    scores: (Q, N) float32 or float64, or an object with the shape and the device of such a tensor that computes rows of
    it, scores[queries], where they are used; relevance: a SameClass or ListedPhotos of these queries, on the same
    device; nearest: how many of the nearest photos to name. Returns a Ranking. Raises ValueError if a score is NaN.
    """
    queries, photos = scores.shape
    in_gallery, nearest = relevance.counts(), min(nearest, photos)
    if scores.device.type != "cpu":
        hits, near = _rank_by_order(scores[:], relevance.mask(), in_gallery, nearest)
        return Ranking(hits, in_gallery, photos, near if nearest else None)
    hits = np.full((queries, int(in_gallery.max())), np.inf)
    near = np.empty((queries, nearest), np.int64)
    for group, relevant in relevance.groups():
        count, low_bits = int(in_gallery[group[0]]), {}
        for block in _blocks(group.numpy(), photos):
            some = scores[block]
            bits = some.numpy().view(np.uint32) if some.dtype == torch.float32 else None
            if bits is None or bits.max() > INFINITY:
                mask = relevant.expand(len(some), -1)
                hits[block, :count], near[block] = _rank_by_order(some, mask, in_gallery[block], nearest)
                continue
            if count:
                hits[block, :count] = _rank_by_keys(bits, relevant.numpy(), count, low_bits)
            if nearest:
                near[block] = _nearest_by_keys(bits, nearest)
    return Ranking(torch.from_numpy(hits), in_gallery, photos, torch.from_numpy(near) if nearest else None)


def _rank_by_order(scores, relevant, in_gallery, nearest):
    """(hits, nearest) by sorting the gallery: the plain way, for float64, negative scores and GPUs.

    relevant: (Q, N) bool, in_gallery: (Q,) how many of each row are true. Raises ValueError if a score is NaN.
    """
    if scores.isnan().any():
        raise ValueError("a score is NaN, which has no rank")
    order = scores.sort(dim=1, stable=True).indices
    query, position = relevant.gather(1, order).nonzero(as_tuple=True)
    number = torch.arange(len(query), device=query.device) - (in_gallery.cumsum(0) - in_gallery)[query]
    hits = torch.full((len(scores), int(in_gallery.max())), torch.inf, dtype=torch.float64, device=scores.device)
    hits[query, number] = (position + 1).double()
    return hits, order[:, :nearest]


def _rank_by_keys(bits, relevant, count, low_bits):
    """Ranks (Q, count) of the relevant photos by sorting integers, many times as fast.

    bits: (Q, N) uint32, those of float32 scores of 0 or more, which have the same order as integers; relevant: (N,)
    bool, of which `count` are true; low_bits: a dict that keeps what keys of these photos share.
    A key, from its highest bit, is the score, the photo's index in the gallery, which breaks ties, and 1 if the photo
    is relevant. Keys of 32 bits are sorted in half the time of 64, but have the score less the lowest of its query, and
    may hold only the upper bits of the index. Where that leaves a relevant photo tied with another one, their keys
    differ by 1, and the query is ranked again with keys of 64 bits.
    """
    lowest = bits.min(axis=1, keepdims=True)
    keys = bits - lowest
    score_bits = max(1, int(keys.max()).bit_length())
    if score_bits not in low_bits:
        index = np.arange(len(relevant)) >> max(0, (len(relevant) - 1).bit_length() + score_bits - 31)
        low_bits[score_bits] = (index << 1 | relevant).astype(np.uint32)
    keys <<= np.uint32(32 - score_bits)
    keys |= low_bits[score_bits]
    ranks, tied = _sort_keys(keys, count)
    if tied.any():
        index = np.arange(len(relevant), dtype=np.uint64)
        ranks[tied], _ = _sort_keys(bits[tied].astype(np.uint64) << 33 | index << 1 | relevant, count)
    return ranks


def _nearest_by_keys(bits, count):
    """The `count` nearest photos (Q, count) of each query, in order; bits: as in `_rank_by_keys`."""
    keys = bits.astype(np.uint64) << 32 | np.arange(bits.shape[1], dtype=np.uint64)
    return np.sort(np.partition(keys, count - 1, axis=1)[:, :count], axis=1).astype(np.uint32)


def _sort_keys(keys, count):
    """Sort keys (Q, N), of which `count` in each row end in 1: (their ranks (Q, count), (Q,) whether one may be tied).

    Such a key may be tied if the key before it differs from it in the last bit alone.
    """
    keys.sort(axis=1)
    keys, rows, photos = keys.ravel(), *keys.shape
    positions = np.flatnonzero((keys.astype(np.uint8) & 1).view(bool))
    tied = keys.take(positions - 1, mode="clip") == keys[positions] - 1
    ranks = positions.reshape(rows, count) - photos * np.arange(rows)[:, None] + 1
    return ranks, tied.reshape(rows, count).any(axis=1)


def _blocks(queries, photos):
    """`queries` cut into blocks of which 32-bit keys have SORT_BYTES: slices where queries follow each other."""
    size = max(1, SORT_BYTES // (4 * photos))
    for block in np.split(queries, range(size, len(queries), size)):
        follow = block[-1] - block[0] == len(block) - 1
        yield slice(block[0], block[-1] + 1) if follow else block


def average_precision(ranking, top=None):
    """Interpolated AP of each query: (1/R) · sum over relevant ranks r ≤ n of the best precision at r..n.

    top: cut n of the ranking, None for all of it. R is the number of relevant photos in the whole gallery, at most n.
    Returns (Q,) float64; NaN where nothing in the gallery is relevant.

    >>> relevance = SameClass(torch.tensor([1]), torch.tensor([0, 1, 1, 0]))
    >>> ranking = rank(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), relevance)
    >>> average_precision(ranking)    # precisions at the hits: 1/2, 2/3
    tensor([0.6667], dtype=torch.float64)
    """
    if top is None:
        return ranking.best_precision.sum(dim=1) / ranking.in_gallery
    best = _best_at_or_after(ranking.precision_until(top)) * (ranking.hits[:, :top] <= top)
    return best.sum(dim=1) / ranking.in_gallery.clamp(max=top)


def precision_at(ranking, k):
    """Share of relevant photos among the first min(k, N) ranks. Returns (Q,) float64.

    >>> relevance = SameClass(torch.tensor([1]), torch.tensor([1, 0, 1]))
    >>> precision_at(rank(torch.tensor([[0.1, 0.2, 0.3]]), relevance), k=2)
    tensor([0.5000], dtype=torch.float64)
    """
    return (ranking.hits[:, :k] <= k).sum(dim=1).double() / min(k, ranking.gallery_size)


def recall_at(ranking, k):
    """Share of the relevant photos in the gallery that are among the first k ranks. Returns (Q,) float64.

    With one relevant photo a query, this is the share of queries whose photo is among the first k. NaN where nothing in
    the gallery is relevant.

    >>> recall_at(rank(torch.tensor([[0.1, 0.2, 0.3]]), ListedPhotos([[1]], 3)), k=1)
    tensor([0.], dtype=torch.float64)
    """
    return (ranking.hits[:, :k] <= k).sum(dim=1).double() / ranking.in_gallery


def plain_average_precision(ranking, top=None):
    """AP of each query without interpolation: the mean of the precisions at its relevant ranks r ≤ top.

    Unlike `average_precision`, it divides by the relevant photos among those ranks. Returns (Q,) float64; 0 where
    there are none.
    """
    if top is None:
        return ranking.precision.sum(dim=1) / ranking.in_gallery.clamp(min=1)
    hits_until_top = (ranking.hits[:, :top] <= top).sum(dim=1)
    return ranking.precision_until(top).sum(dim=1) / hits_until_top.clamp(min=1)


def average_precision_over_k(ranking, k):
    """Sum of the precisions at the hits among the first k ranks, over min(k, N). Returns (Q,) float64."""
    return ranking.precision_until(k).sum(dim=1) / min(k, ranking.gallery_size)


def capped_precision_at(ranking, k):
    """Share of relevant photos among the first min(k, relevant in the gallery) ranks. Returns (Q,) float64."""
    cut = ranking.in_gallery.clamp(max=k)
    return (ranking.hits[:, :k] <= cut[:, None]).sum(dim=1).double() / cut.clamp(min=1)


def class_means(values, labels):
    """Mean of values (Q, ...) over the queries of each class: (classes that occur, ascending; their means, float64)."""
    classes, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), *values.shape[1:], dtype=torch.float64, device=values.device)
    sums.index_add_(0, index, values.double())
    return classes, sums / index.bincount(minlength=len(classes)).view(-1, *[1] * (values.ndim - 1))


def over_classes(values, labels):
    """An average over the queries of each class, then over classes: the class means (C,) of values (Q,)."""
    return class_means(values, labels)[1]


def over_queries(values, labels):
    """An average over all queries: their values (Q,)."""
    return values.double()


class Metric(NamedTuple):
    """What a metric gives each query, and what its average is over."""

    function: Callable  # of a Ranking and a cut of it; returns (Q,) float64
    average: Callable  # over_classes or over_queries: values (Q,) and labels (Q,) -> the numbers whose mean is reported


METRICS = {  # without the cut, see `get_metric`
    "mAP": Metric(average_precision, over_classes),
    "Prec": Metric(precision_at, over_classes),
    "Recall": Metric(recall_at, over_queries),
    "plain mAP": Metric(plain_average_precision, over_queries),
    "mAP over k": Metric(average_precision_over_k, over_queries),
    "capped Prec": Metric(capped_precision_at, over_queries),
}
STANDARD = ("mAP@all", "mAP@200", "Prec@100", "Prec@200")  # in every results.json


class Definition(NamedTuple):
    """What papers mean by mAP and Prec."""

    average_precision: str  # of METRICS
    precision: str | None
    average: Callable  # over_classes or over_queries


DEFINITIONS = {
    "SBKA, SAKE": Definition("mAP", "Prec", average=over_classes),
    "ZSE-SBIR": Definition("mAP", "capped Prec", average=over_queries),
    "SEM-PCYC": Definition("plain mAP", "Prec", average=over_queries),
    "torchmetrics": Definition("plain mAP", None, average=over_queries),
    "ACNet": Definition("mAP", "Prec", average=over_queries),
    "doodle2search": Definition("plain mAP", "Prec", average=over_queries),
    "CVAE": Definition("mAP over k", "Prec", average=over_queries),
}
# The metrics that DEFINITIONS need; another metric of a definition, such as CVAE's mAP@all, does not exist.
DEFINED = (*STANDARD, "plain mAP@all", "plain mAP@200", "mAP over k@200", "capped Prec@100", "capped Prec@200")


def by_definition(values, labels):
    """Each of STANDARD under all DEFINITIONS: {definition: {name: float}}.

    values: {name of DEFINED: (Q,) values of the queries}; labels: (Q,) their classes.
    """
    table = {}
    for name, definition in DEFINITIONS.items():
        table[name] = {}
        for standard in STANDARD:
            kind, _, cut = standard.partition("@")
            metric = definition.average_precision if kind == "mAP" else definition.precision
            if (measured := f"{metric}@{cut}") in DEFINED:
                table[name][standard] = definition.average(values[measured], labels).mean().item()
    return table


def get_metric(name):
    """The Metric of that name, whose function takes a Ranking alone.

    name: one of METRICS, @ and the cut of the ranking; "all" is no cut. Raises ValueError for any other name.

    >>> ranking = rank(torch.tensor([[0.1, 0.2, 0.3]]), SameClass(torch.tensor([1]), torch.tensor([1, 0, 1])))
    >>> get_metric("Prec@2").function(ranking), get_metric("mAP@all").function(ranking)
    (tensor([0.5000], dtype=torch.float64), tensor([0.8333], dtype=torch.float64))
    """
    kind, _, cut = name.partition("@")
    # A function that has a default for its cut can do without one.
    uncut = [f"{each}@all" for each, metric in METRICS.items() if metric.function.__defaults__]
    if name in uncut:
        return METRICS[kind]
    if kind not in METRICS or not re.fullmatch("[1-9][0-9]{0,8}", cut):
        possible = ", ".join([*uncut, *(f"{each}@k" for each in METRICS)])
        raise ValueError(f"there is no metric {name!r}; there are {possible} with a whole number k from 1 on")
    function = METRICS[kind].function
    return METRICS[kind]._replace(function=lambda ranking: function(ranking, int(cut)))


def precision_at_recall(ranking):
    """Interpolated precision at the RECALL_LEVELS 0, 0.1, ..., 1: (Q, 11) float64; 0 where nothing is relevant."""
    if not ranking.hits.shape[1]:
        return ranking.hits.new_zeros(len(ranking.hits), len(RECALL_LEVELS))
    # The least number of hits that reaches a level; less a rounding, so that 0.3 · 10 is 3.
    needed = (RECALL_LEVELS.to(ranking.hits.device) * ranking.in_gallery[:, None] - 1e-9).ceil().long()
    return ranking.best_precision.gather(1, (needed - 1).clamp(min=0))


def _best_at_or_after(precision):
    """Best precision (Q, R) at each hit or any later one."""
    return precision.flip(1).cummax(dim=1).values.flip(1) if precision.shape[1] else precision
