"""AP and Prec@k of rankings, and their average over classes, as the zero-shot protocols define them.

AP here is *interpolated* and its divisor counts the whole gallery; Prec@k divides by at most the gallery's size; both
are averaged over the queries of a class, then over classes. Other tools mean other things by the same names.
Stands alone.
"""

import torch


def rank(scores, query_labels, gallery_labels):
    """Sort each query's gallery by ascending score, ties by gallery order, and tell which ranks are relevant.

    scores: (Q, N); labels: (Q,) and (N,). Returns (Q, N) bool, nearest first.
    """
    order = torch.sort(scores, dim=1, stable=True).indices
    return gallery_labels[order] == query_labels[:, None]


def average_precision(relevant, top=None):
    """Interpolated AP of each query: (1/R) · sum over relevant ranks r ≤ n of the best precision at r..n.

    relevant: (Q, N) bool, nearest first. top: cut n of the ranking, None for all of it. R is the number of relevant
    items in the whole gallery, at most n. Returns (Q,) float64; NaN where nothing in the gallery is relevant.

    >>> average_precision(torch.tensor([[False, True, True, False]]))    # precisions at the hits: 1/2, 2/3
    tensor([0.6667], dtype=torch.float64)
    """
    in_gallery = relevant.sum(dim=1)
    relevant = relevant[:, :top]
    n = relevant.shape[1]
    hits = relevant.cumsum(dim=1, dtype=torch.float64)
    precision = hits / torch.arange(1, n + 1, dtype=torch.float64, device=relevant.device)
    best_from_here = precision.flip(1).cummax(dim=1).values.flip(1)
    return (best_from_here * relevant).sum(dim=1) / in_gallery.clamp(max=n)


def precision_at(relevant, k):
    """Share of relevant items among the first min(k, N) ranks. relevant: (Q, N) bool. Returns (Q,) float64.

    >>> precision_at(torch.tensor([[True, False, True, True]]), k=2)
    tensor([0.5000], dtype=torch.float64)
    """
    return relevant[:, :k].double().mean(dim=1)


def class_means(values, labels):
    """Mean of values (Q,) over the queries of each class: (classes that occur, ascending; their means, float64)."""
    classes, index = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), dtype=torch.float64, device=values.device).index_add_(0, index, values.double())
    return classes, sums / index.bincount(minlength=len(classes))
