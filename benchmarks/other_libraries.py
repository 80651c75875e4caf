"""What users would pick instead for one-to-one AP, as their documentation has it. Each is imported where it is used.

PEERS: {title: function that imports the peer and returns compute(gallery, gallery_labels, query, query_labels)}, which
takes tensors on the CPU and returns the mean AP over queries, not interpolated.
"""

import numpy as np
import torch

CHUNK = 500  # queries at a time, where a peer leaves that to its user


def open_metric_learning():
    from oml.functional.metrics import calc_map

    def compute(gallery, gallery_labels, query, query_labels):
        order = torch.cdist(query, gallery).argsort(dim=1)
        relevant = gallery_labels[order] == query_labels[:, None]
        return calc_map(tuple(relevant), relevant.sum(dim=1).tolist(), (len(gallery),))[0].mean()

    return compute


def torchmetrics_function():
    from torchmetrics.functional.retrieval import retrieval_average_precision

    return lambda *arrays: _one_by_one(retrieval_average_precision, *arrays)


def torchmetrics_class():
    from torchmetrics.retrieval import RetrievalMAP

    def compute(gallery, gallery_labels, query, query_labels):
        metric = RetrievalMAP()
        for first in range(0, len(query), CHUNK):
            scores, relevant = _similarities(gallery, gallery_labels, query, query_labels, first)
            index = torch.arange(first, first + len(scores))[:, None].expand_as(scores)
            metric.update(scores.flatten(), relevant.flatten(), index.flatten())
        return metric.compute()

    return compute


def scikit_learn():
    from sklearn.metrics import average_precision_score

    def one(scores, relevant):
        return average_precision_score(relevant.numpy(), scores.numpy())

    return lambda *arrays: _one_by_one(one, *arrays)


def faiss_search():
    import faiss

    def compute(gallery, gallery_labels, query, query_labels):
        index = faiss.IndexFlatL2(gallery.shape[1])
        index.add(gallery.numpy())
        order = index.search(query.numpy(), len(gallery))[1]
        relevant = gallery_labels.numpy()[order] == query_labels.numpy()[:, None]
        del order
        precision = relevant.cumsum(axis=1) / np.arange(1, len(gallery) + 1)
        return ((precision * relevant).sum(axis=1) / relevant.sum(axis=1)).mean()

    return compute


def pytorch_metric_learning():
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    def compute(gallery, gallery_labels, query, query_labels):
        calculator = AccuracyCalculator(include=("mean_average_precision",), k=len(gallery), device=torch.device("cpu"))
        return calculator.get_accuracy(query, query_labels, gallery, gallery_labels)["mean_average_precision"]

    return compute


def _similarities(gallery, gallery_labels, query, query_labels, first):
    """Of a chunk, positive, as torchmetrics drops what is not, and which are relevant."""
    part = slice(first, first + CHUNK)
    return 2 - torch.cdist(query[part], gallery), query_labels[part, None] == gallery_labels


def _one_by_one(average_precision, *arrays):
    values = []
    for first in range(0, len(arrays[2]), CHUNK):
        values += [float(average_precision(*pair)) for pair in zip(*_similarities(*arrays, first), strict=True)]
    return np.mean(values)


PEERS = {
    "open-metric-learning calc_map": open_metric_learning,
    "torchmetrics retrieval_average_precision": torchmetrics_function,
    "faiss IndexFlatL2, k = N, and NumPy": faiss_search,
    "scikit-learn average_precision_score": scikit_learn,
    "pytorch-metric-learning AccuracyCalculator": pytorch_metric_learning,
    "torchmetrics RetrievalMAP": torchmetrics_class,
}
