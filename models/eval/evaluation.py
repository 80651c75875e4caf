"""Matching and metrics of all rows of a grid in one pass over the queries, in memory that does not grow with them."""

import threading

import torch
from tqdm import tqdm

from models import parallel
from models.eval.matching import (
    cluster_distances,
    code_members,
    euclidean_distances,
    fused_scores,
    nearest_codes,
)
from models.eval.metrics import RECALL_LEVELS, STANDARD, metric, precision_at_recall, rank
from models.eval.workers import workers
from models.parallel import note

# Bytes of one matrix of a chunk of queries × gallery, of which a handful live at a time.
CPU_CHUNK, GPU_CHUNK = 24 << 20, 256 << 20


def evaluate(features, codebooks, metrics=STANDARD, nearest=None, device="cpu", dtype=torch.float32):
    """Measure one-to-one matching and one-to-many matching with each codebook.

    features: Features; codebooks: {key: (M, K, d) array, or None for one-to-one matching}; metrics: names that
    models.eval.metrics.metric takes; nearest: {key: how many of its nearest photos are kept, too}. Distances and scores
    are of `dtype`. On the CPU chunks run side by side, one a core. A chunk that does not fit into a device's memory is
    halved, and so are later ones, which is said once.
    Returns {key: {name: one value a query}} on the CPU: metrics (Q,), "curve" (Q, 11) and "nearest" (Q, k) int64.
    """
    metrics, nearest = {name: metric(name) for name in metrics}, nearest or {}
    gallery, gallery_labels, query_labels = (
        torch.from_numpy(values).to(device)
        for values in (features.gallery, features.gallery_labels, features.query_labels)
    )
    gallery, query = gallery.to(dtype), torch.from_numpy(features.query)
    rows = {}
    for key, codebook in codebooks.items():
        if codebook is None:
            rows[key] = None
            continue
        codebook = torch.from_numpy(codebook).to(gallery)
        rows[key] = codebook, code_members(nearest_codes(gallery, codebook), codebook.shape[1]).to(dtype)

    # Filled in place: small results kept between large temporaries would keep the memory of those.
    measured = {key: {name: torch.empty(len(query), dtype=torch.float64) for name in metrics} for key in rows}
    for key, values in measured.items():
        values["curve"] = torch.empty(len(query), len(RECALL_LEVELS), dtype=torch.float64)
        if key in nearest:
            values["nearest"] = torch.empty(len(query), min(nearest[key], len(gallery)), dtype=torch.int64)
    local = threading.local()

    def scratch(count):
        """Two matrices of count queries × gallery; each thread keeps its own, as making new ones costs page faults."""
        if len(getattr(local, "matrices", [[]])[0]) < count:
            local.matrices = [gallery.new_empty(count, len(gallery)) for _ in range(2)]
        return [matrix[:count] for matrix in local.matrices]

    def measure(chosen):
        part, labels = query[chosen].to(device, dtype), query_labels[chosen.to(device)]
        distances, fused = scratch(len(chosen))
        euclidean_distances(part, gallery, out=distances)
        for key, codes in rows.items():
            if codes is None:
                scores = distances
            else:
                scores = fused_scores(cluster_distances(part, *codes, out=fused), distances, out=fused)
            ranking = rank(scores, labels, gallery_labels, nearest.get(key, 0))
            values = {name: measure_of(ranking) for name, measure_of in metrics.items()}
            values["curve"] = precision_at_recall(ranking)
            if ranking.nearest is not None:
                values["nearest"] = ranking.nearest
            for name, value in values.items():
                measured[key][name][chosen] = value.cpu()
        return len(chosen)

    on_cpu = torch.device(device).type == "cpu"
    size = (CPU_CHUNK if on_cpu else GPU_CHUNK) // (len(gallery) * gallery.element_size())
    # By class: a chunk of one class has one set of relevant photos.
    chunks = torch.from_numpy(features.query_labels.argsort(kind="stable")).split(max(1, size))
    with (
        workers(None if on_cpu else 1) as pool,
        tqdm(total=len(query), desc="matching", unit="sketch", leave=False, disable=parallel.bar()) as progress,
    ):
        for count in pool.map(_halving(measure), chunks):
            progress.update(count)
    return measured


def _halving(measure):
    """`measure` for chunks that may not fit into memory, which is found out by trying: a sum of what it returns."""
    fitting = None

    def run(chosen):
        nonlocal fitting
        if fitting is None or len(chosen) <= fitting:
            try:
                return measure(chosen)
            except torch.OutOfMemoryError:
                if len(chosen) == 1:
                    raise
                if fitting is None:
                    note(f"note: {len(chosen)} sketches at a time do not fit into the device's memory, trying fewer")
                fitting = (len(chosen) + 1) // 2
        half = (len(chosen) + 1) // 2
        return run(chosen[:half]) + run(chosen[half:])

    return run
