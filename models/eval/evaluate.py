"""Matching and metrics of all rows of a grid in one pass over the queries, in memory that does not grow with them."""

import threading
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models.eval.matching import (
    CLUSTER_WEIGHT,
    cluster_distances,
    code_members,
    euclidean_distances,
    fused_scores,
    nearest_codes,
)
from models.eval.metrics import RECALL_LEVELS, STANDARD, get_metric, precision_at_recall, rank
from models.networks import matmul_rules
from utils.cli import is_out_of_memory
from utils.distributed import bar_disabled, log_rank0
from utils.process_pool import thread_pool

# Bytes of one matrix of a chunk of queries × gallery, of which a handful live at a time.
CPU_CHUNK, GPU_CHUNK = 24 << 20, 256 << 20


class WeightedCodebook(NamedTuple):
    """A codebook, and the weight of cluster distances in its scores. Rows that follow each other share distances."""

    codebook: np.ndarray  # (M, K, d)
    cluster_weight: float = CLUSTER_WEIGHT


def evaluate_rows(features, codebooks, metrics=STANDARD, nearest=None, device="cpu", dtype=torch.float32):
    """Measure one-to-one matching and one-to-many matching with each codebook.

    features: Features; codebooks: {key: (M, K, d) array, a WeightedCodebook, or None for one-to-one matching}; metrics:
    names that models.eval.metrics.get_metric takes; nearest: {key: how many of its nearest photos are kept, too}.
    Distances and scores are of `dtype`. On the CPU chunks run side by side, one a core. A chunk that does not fit into
    a device's memory is halved, and so are later ones, which is said once.
    Returns {key: {name: one value a query}} on the CPU: metrics (Q,), "curve" (Q, 11) and "nearest" (Q, k) int64.
    """
    functions, nearest = {name: get_metric(name) for name in metrics}, nearest or {}
    gallery = _Gallery(features, codebooks, device, dtype)
    query, labels = torch.from_numpy(features.query), torch.from_numpy(features.query_labels)
    measured = {key: _space(len(query), functions, min(nearest.get(key, 0), len(gallery))) for key in codebooks}

    def measure(chosen):
        own_labels = labels[chosen].to(device)
        for key, scores in gallery.scores(query[chosen].to(device, dtype)):
            ranking = rank(scores, own_labels, gallery.labels, nearest.get(key, 0))
            values = {name: function(ranking) for name, function in functions.items()}
            values["curve"] = precision_at_recall(ranking)
            if ranking.nearest is not None:
                values["nearest"] = ranking.nearest
            for name, value in values.items():
                measured[key][name][chosen] = value.cpu()
        return len(chosen)

    # By class: a chunk of one class has one set of relevant photos.
    chunks = labels.argsort(stable=True).split(gallery.chunk)
    with (
        matmul_rules("fp32"),  # distances are float32, whatever the networks were computed in
        thread_pool() if gallery.on_cpu else nullcontext() as pool,
        tqdm(total=len(query), desc="matching", unit="sketch", leave=False, disable=bar_disabled()) as progress,
    ):
        for count in (pool.map if pool else map)(_halving(measure, gallery.free), chunks):
            progress.update(count)
    return measured


def _space(queries, metrics, nearest):
    """Where the values of a row go. Small results kept between large temporaries would keep the memory of those."""
    values = {name: torch.empty(queries, dtype=torch.float64) for name in metrics}
    values["curve"] = torch.empty(queries, len(RECALL_LEVELS), dtype=torch.float64)
    if nearest:
        values["nearest"] = torch.empty(queries, nearest, dtype=torch.int64)
    return values


class _Gallery:
    """The photos on their device, with their codes in each codebook, to be matched with chunks of sketches.

    chunk: how many sketches at a time.
    """

    def __init__(self, features, codebooks, device, dtype):
        self.photos = torch.from_numpy(features.gallery).to(device, dtype)
        self.labels = torch.from_numpy(features.gallery_labels).to(device)
        self.on_cpu = self.photos.device.type == "cpu"
        size = CPU_CHUNK if self.on_cpu else GPU_CHUNK
        self.chunk = max(1, size // (len(self.photos) * self.photos.element_size()))
        self.rows, self.local = [], threading.local()  # (codes, or None for one-to-one, [(key, weight), ...])
        known = None
        for key, codebook in codebooks.items():
            codebook, weight = codebook if isinstance(codebook, WeightedCodebook) else (codebook, CLUSTER_WEIGHT)
            if not self.rows or codebook is None or codebook is not known:
                self.rows.append((self._codes(codebook), []))
            self.rows[-1][1].append((key, weight))
            known = codebook
        self.spare = 3 if any(len(keys) > 1 for _, keys in self.rows) else 2

    def __len__(self):
        return len(self.photos)

    def _codes(self, codebook):
        """(codebook on the device, members (M·K, N) of its codes), what a row compares sketches with; None for None."""
        if codebook is None:
            return None
        codebook = torch.from_numpy(codebook).to(self.photos)
        return codebook, code_members(nearest_codes(self.photos, codebook), codebook.shape[1]).to(self.photos.dtype)

    def scores(self, query):
        """Give (key, scores (Q, N)) for each row; the scores of one row are overwritten by those of the next."""
        distances, *spare = self._scratch(len(query))
        euclidean_distances(query, self.photos, out=distances)
        for codes, keys in self.rows:
            if codes is None:
                yield keys[0][0], distances
                continue
            cluster = cluster_distances(query, *codes, out=spare[0])
            for number, (key, weight) in enumerate(keys, 1):
                out = cluster if number == len(keys) else spare[1]  # cluster distances last as long as they are needed
                yield key, fused_scores(cluster, distances, weight, out=out)

    def _scratch(self, count):
        """Matrices of count queries × gallery; each thread keeps its own, as making new ones costs page faults."""
        if len(getattr(self.local, "matrices", [[]])[0]) < count:
            self.local.matrices = [self.photos.new_empty(count, len(self)) for _ in range(self.spare)]
        return [matrix[:count] for matrix in self.local.matrices]

    def free(self):
        """Let go of this thread's matrices."""
        self.local.matrices = [[]]


def _halving(measure, free):
    """`measure` for chunks that may not fit into memory, which is found out by trying: a sum of what it returns.

    free: makes room before the next try.
    """
    fitting = None

    def run(chosen):
        nonlocal fitting
        if fitting is None or len(chosen) <= fitting:
            try:
                return measure(chosen)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(chosen) == 1:
                    raise
                if fitting is None:
                    log_rank0(
                        f"note: {len(chosen)} sketches at a time do not fit into the device's memory, trying fewer"
                    )
                fitting = (len(chosen) + 1) // 2
            free()  # out of the except block, where the error would keep what was in memory
        half = (len(chosen) + 1) // 2
        return run(chosen[:half]) + run(chosen[half:])

    return run
