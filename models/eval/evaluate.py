"""Evaluation of a grid of (M, K): fits codebooks, matches all queries in one pass, and averages metrics.

Ranks share the mixtures and the queries. Queries are matched in chunks, so that memory does not grow with their number.
"""

import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from models.eval.codebooks import fit_codebooks
from models.eval.matching import (
    CLUSTER_WEIGHT,
    cluster_distances,
    distinct_codes,
    euclidean_distances,
    fused_scores,
    nearest_codes,
)
from models.eval.metrics import (
    DEFINED,
    RECALL_LEVELS,
    STANDARD,
    SameClass,
    by_definition,
    class_means,
    get_metric,
    precision_at_recall,
    rank,
)
from models.networks import matmul_rules
from utils import distributed
from utils.cli import is_out_of_memory
from utils.distributed import bar_disabled, log_rank0
from utils.process_pool import thread_pool

# Bytes of one (chunk of queries, gallery) matrix, of which a handful are allocated at a time.
CPU_CHUNK, GPU_CHUNK = 48 << 20, 256 << 20


# --- the grid


@dataclass(frozen=True)
class Grid:
    """The rows of one-to-many matching, and how their mixtures are fitted."""

    rows: list[tuple[int, int]]  # (M, K); none: one-to-one matching alone
    seeds: tuple[int, ...] = (123,)
    mixture: str = "torch"  # see models.eval.codebooks.fit_codebook
    mixture_device: str = "cpu"
    cluster_weights: tuple[float, ...] = (CLUSTER_WEIGHT,)
    nearest: int = 10  # nearest photos to name for each query of the row that is shown

    def weighted_rows(self):
        """(M, K, cluster weight) of each row."""
        return [(*row, weight) for row in self.rows for weight in self.cluster_weights]


class Averages(NamedTuple):
    """Metrics of one row and seed, averaged; arrays are float64."""

    metrics: dict  # {name: the numbers whose mean is the metric, see models.eval.metrics.Metric.average}
    per_class: dict  # {name: (C,) mean over the queries of each class, by ascending label}
    curve: np.ndarray  # (C, 11) interpolated precision at RECALL_LEVELS of each class
    definitions: dict  # see models.eval.metrics.by_definition


class EvalResult(NamedTuple):
    """The result of a Grid; a row is (M, K, cluster weight), or None for one-to-one matching, whose seed is None."""

    averages: dict  # {row: {seed: Averages, or why there are none}}
    per_query: dict  # {row: {metric: (Q,) float64, the mean over seeds}}
    shown: tuple | None  # the row that figures show
    nearest: torch.Tensor  # (Q, k) int64, the nearest photos in that row for the first seed
    nearest_relevant: torch.Tensor  # (Q, k) bool, whether they are relevant


def evaluate_grid(features, grid, metrics=STANDARD, relevance=None, device="cpu", dtype=torch.float32):
    """Evaluate one-to-one matching and all rows of a Grid, on all ranks together.

    features, metrics, relevance, device, dtype: see `evaluate_rows`. Returns an EvalResult on rank 0, None elsewhere.
    """
    relevance, labels = relevance or class_relevance(features), torch.from_numpy(features.query_labels)
    share = distributed.rank_slice(len(labels))
    own = replace(features, query=features.query[share], query_labels=features.query_labels[share])
    own_relevance = relevance[torch.arange(len(labels))[share]]
    averages, values_of_seeds = {None: {}} | {key: {} for key in grid.weighted_rows()}, {}
    shown, nearest = None, (None, None)
    for number, seed in enumerate(grid.seeds if grid.rows else [None]):
        codebooks, failures = fit_grid(features.gallery, grid, seed)
        for key, reason in failures.items():
            averages[key][str(seed)] = reason
        if number == 0:  # one-to-one matching is the same for every seed
            shown = _row_to_show(codebooks, len(np.unique(features.gallery_labels)), grid)
            codebooks = {None: None} | codebooks
        measured = evaluate_rows(
            own,
            codebooks,
            (*metrics, *DEFINED),
            relevance=own_relevance,
            nearest={shown: grid.nearest} if number == 0 else {},
            device=device,
            dtype=dtype,
        )
        for key, own_values in measured.items():
            values = {name: distributed.gather_concat(value) for name, value in own_values.items()}
            if distributed.get_rank() != 0:
                continue
            if "nearest" in values:
                nearest = values["nearest"], values["nearest_relevant"]
            averages[key][None if key is None else str(seed)] = aggregate(values, labels, metrics)
            values_of_seeds.setdefault(key, []).append(torch.stack([values[name] for name in metrics]))
    if distributed.get_rank() != 0:
        return None
    per_query = {
        key: dict(zip(metrics, torch.stack(seeds).mean(dim=0), strict=True)) for key, seeds in values_of_seeds.items()
    }
    return EvalResult(averages, per_query, shown, *nearest)


def fit_grid(gallery, grid, seed):
    """Fit the codebooks of a Grid: ({row: WeightedCodebook}, {row: why it could not be fitted}), on all ranks."""
    if not grid.rows:
        return {}, {}
    codebooks, failures = fit_codebooks(gallery, grid.rows, seed, grid.mixture, grid.mixture_device)
    fitted = {key: WeightedCodebook(codebooks[key[:2]], key[2]) for key in grid.weighted_rows() if key[:2] in codebooks}
    return fitted, {key: failures[key[:2]] for key in grid.weighted_rows() if key[:2] in failures}


def aggregate(values, labels, metrics):
    """Averages of the values that `evaluate_rows` gives a row; labels: (Q,) classes of the queries."""
    return Averages(
        metrics={name: get_metric(name).average(values[name], labels).numpy() for name in metrics},
        per_class={name: class_means(values[name], labels)[1].numpy() for name in metrics},
        curve=class_means(values["curve"], labels)[1].numpy(),
        definitions=by_definition(values, labels),
    )


def _row_to_show(codebooks, classes, grid):
    """The row with as many clusters as classes, else the last row; if it was not fitted, the last fitted row."""
    keys = grid.weighted_rows()
    wanted = next((key for key in keys if key[1] == classes), keys[-1] if keys else None)
    return wanted if wanted in codebooks else next(reversed(codebooks), None)


# --- one pass over the queries


class WeightedCodebook(NamedTuple):
    """A codebook, and the weight of cluster distances in its scores; consecutive rows of a codebook share distances."""

    codebook: np.ndarray  # (M, K, d)
    cluster_weight: float = CLUSTER_WEIGHT


def class_relevance(features):
    """The SameClass of Features."""
    return SameClass(torch.from_numpy(features.query_labels), torch.from_numpy(features.gallery_labels))


def evaluate_rows(
    features, codebooks, metrics=STANDARD, relevance=None, nearest=None, device="cpu", dtype=torch.float32
):
    """Evaluate one-to-one matching and one-to-many matching with each codebook.

    features: Features; codebooks: {key: (M, K, d) array, a WeightedCodebook, or None for one-to-one matching}; metrics:
    names that models.eval.metrics.get_metric takes; relevance: which photos are relevant to each query (default: those
    of its class); nearest: {key: how many of the nearest photos to name, too}; dtype: of distances and scores.
    On the CPU, chunks run in parallel, one on each core. A chunk that does not fit into a device's memory is halved,
    and so are later ones, which is printed once.
    Returns {key: {name: values of the queries}} on the CPU: metrics (Q,) float64, "curve" (Q, 11) float64, and of the
    nearest photos "nearest" (Q, k) int64 and "nearest_relevant" (Q, k) bool.
    """
    functions, nearest = {name: get_metric(name).function for name in metrics}, nearest or {}
    gallery, query = _Gallery(features.gallery, codebooks, device, dtype), torch.from_numpy(features.query)
    relevance = relevance or class_relevance(features)
    chunks = relevance.grouped().split(gallery.chunk)  # ranking is fastest where queries share their relevant photos
    relevance = relevance.to(device)
    measured = {
        key: _empty_values(len(query), functions, min(nearest.get(key, 0), len(gallery.photos))) for key in codebooks
    }

    def measure(chunk):
        relevant = relevance[chunk.to(device)]
        for key, scores in gallery.scores(query[chunk].to(device, dtype)):
            ranking = rank(scores, relevant, nearest.get(key, 0))
            values = {name: function(ranking) for name, function in functions.items()}
            values["curve"] = precision_at_recall(ranking)
            if ranking.nearest is not None:
                values |= {"nearest": ranking.nearest, "nearest_relevant": ranking.nearest_relevant()}
            for name, value in values.items():
                measured[key][name][chunk] = value.cpu()
        return len(chunk)

    with (
        matmul_rules("fp32"),  # distances are float32, whatever the networks were computed in
        thread_pool() if gallery.on_cpu else nullcontext() as pool,
        tqdm(total=len(query), desc="matching", unit="sketch", leave=False, disable=bar_disabled()) as progress,
    ):
        for count in (pool.map if pool else map)(_halving(measure, gallery.free), chunks):
            progress.update(count)
    return measured


def _empty_values(queries, metrics, nearest):
    """Arrays for the values of a row, preallocated, since small tensors between large temporaries fragment the heap."""
    values = {name: torch.empty(queries, dtype=torch.float64) for name in metrics}
    values["curve"] = torch.empty(queries, len(RECALL_LEVELS), dtype=torch.float64)
    if nearest:
        values["nearest"] = torch.empty(queries, nearest, dtype=torch.int64)
        values["nearest_relevant"] = torch.empty(queries, nearest, dtype=torch.bool)
    return values


class _Gallery:
    """The photos on their device, with their codes in each codebook.

    photos: (N, D) tensor; chunk: number of queries to match at a time.
    """

    def __init__(self, photos, codebooks, device, dtype):
        self.photos = torch.from_numpy(photos).to(device, dtype)
        self.on_cpu = self.photos.device.type == "cpu"
        size = CPU_CHUNK if self.on_cpu else GPU_CHUNK
        self.chunk = max(1, size // (len(self.photos) * self.photos.element_size()))
        self.rows, self.local = [], threading.local()  # (codes, or None for one-to-one, [(key, weight), ...])
        last = None
        for key, codebook in codebooks.items():
            codebook, weight = codebook if isinstance(codebook, WeightedCodebook) else (codebook, CLUSTER_WEIGHT)
            if not self.rows or codebook is None or codebook is not last:
                self.rows.append((self._codes(codebook), []))
            self.rows[-1][1].append((key, weight))
            last = codebook

    def _codes(self, codebook):
        """(codebook, codes of its cells, cell of each photo) on the device, see `distinct_codes`; None for None.

        Cells are int32, of which photos are selected faster.
        """
        if codebook is None:
            return None
        codebook = torch.tensor(codebook).to(self.photos)  # a copy: that of an index is read-only
        codes, cells = distinct_codes(nearest_codes(self.photos, codebook))
        return codebook, codes, cells.int()

    def scores(self, query):
        """Yield (key, scores (Q, N)) for each row, for models.eval.metrics.rank."""
        if len(getattr(self.local, "distances", [])) < len(query):  # each thread reuses its own: new ones cost faults
            self.local.distances = self.photos.new_empty(len(query), len(self.photos))
        distances = euclidean_distances(query, self.photos, out=self.local.distances[: len(query)])
        for codes, keys in self.rows:
            if codes is None:
                yield keys[0][0], distances
                continue
            *codebook_and_codes, cells = codes
            cluster = cluster_distances(query, *codebook_and_codes)
            for key, weight in keys:
                yield key, _FusedScores(cluster, distances, weight, cells)

    def free(self):
        """Free this thread's matrix."""
        self.local.distances = []


@dataclass(frozen=True)
class _FusedScores:
    """`fused_scores` of some queries when they are asked for, which then are in a cache when they are ranked."""

    cluster: torch.Tensor  # (Q, cells)
    distances: torch.Tensor  # (Q, N)
    weight: float
    cells: torch.Tensor  # (N,)

    @property
    def shape(self):
        return self.distances.shape

    @property
    def device(self):
        return self.distances.device

    def __getitem__(self, queries):
        return fused_scores(self.cluster[queries], self.distances[queries], self.weight, self.cells)


def _halving(measure, free):
    """`measure` for chunks that may not fit into memory: halves them on OOM, and returns the sum of its results.

    free: frees memory before the next try.
    """
    fitting = None  # the largest number of queries to try

    def run(chunk):
        nonlocal fitting
        if fitting is None or len(chunk) <= fitting:
            try:
                return measure(chunk)
            except RuntimeError as error:
                if not is_out_of_memory(error) or len(chunk) == 1:
                    raise
                if fitting is None:
                    log_rank0(
                        f"note: {len(chunk)} sketches at a time do not fit into the device's memory, trying fewer"
                    )
                fitting = (len(chunk) + 1) // 2
            free()  # outside the except block, where the exception would keep the tensors alive
        half = (len(chunk) + 1) // 2
        return run(chunk[:half]) + run(chunk[half:])

    return run
