"""Features of unseen-class sketches (queries) and photos (gallery): computed, or read from a features_zero.pickle.

features_zero.pickle  [gallery features (N, D) float32, gallery labels (N,), query features (Q, D), query labels (Q,),
                      None or a distance matrix, which is not read], as the authors publish it
features_zero.json    what our own pickle was computed from, so that an outdated one is never used without a word
"""

import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from datasets.loaders import evaluation_loader
from models.eval.unfinished import PartialFeatures
from models.networks import arithmetic, normalise
from utils import distributed
from utils.cli import InputError
from utils.distributed import bar_disabled, log_rank0
from utils.files import atomic_write, sha256_of, write_json
from utils.safe_pickle import read_pickled_list

FEATURES = "features_zero.pickle"


@dataclass(frozen=True)
class Features:
    """L2-normalised features, float32, and class labels, int64, as NumPy arrays."""

    gallery: np.ndarray  # (N, D)
    gallery_labels: np.ndarray  # (N,)
    query: np.ndarray  # (Q, D)
    query_labels: np.ndarray  # (Q,)
    names: list[str] | None = None  # of the classes, by label


def extract_all(student, images, loading, precision="fp32", keep=None):
    """Features of QueryGallery, each process extracting its share of them; None but in process 0.

    loading: LoaderOptions; precision: see models.networks.arithmetic. keep: a function of (title, this rank's slice)
    that gives an Unfinished to keep features in as they come; without it a killed extraction starts anew.
    Raises FloatingPointError for features that are not finite.
    """
    parts = []
    for files, title in images.items():
        share = distributed.rank_slice(len(files))
        part = keep(title, share) if keep else None
        done = part.done if part else 0
        loader = evaluation_loader(files, loading, share.start + done, share.stop)
        rows = []
        for batch in extract(student, loader, loading.device, title, precision, done):
            part.add(batch) if part else rows.append(batch)
        rows = part.read() if part else np.concatenate([*rows, np.empty((0, student.width), np.float32)])
        if not np.isfinite(rows).all():
            if part:
                part.remove()
            raise FloatingPointError(f"features of {title} are not finite")
        parts += [distributed.gather_concat(rows), files.labels]
    return Features(*parts) if distributed.get_rank() == 0 else None


def extract(student, loader, device, title="features", precision="fp32", done=0):
    """Yield the L2-normalised features of each batch of `loader`: (n, D) float32 arrays.

    precision: see models.networks.arithmetic. The progress bar is called `title` and begins at `done` images.
    """
    student.eval().to(memory_format=torch.channels_last)
    total = done + len(loader.dataset)
    with tqdm(total=total, initial=done, desc=title, unit="image", leave=False, disable=bar_disabled()) as bar:
        for images, _ in loader:
            rows = embed(student, images, device, precision)
            yield rows
            bar.update(len(rows))


def embed(student, images, device, precision="fp32"):
    """L2-normalised features of images (n, 3, H, W) uint8: (n, D) float32 array. `student` is as `extract` leaves it.

    precision: see models.networks.arithmetic.
    """
    with torch.inference_mode(), arithmetic(precision, device):
        images = normalise(images.to(device, non_blocking=True), *student.statistics)
        features = student.features(images.contiguous(memory_format=torch.channels_last))
        return F.normalize(features.float(), dim=1).cpu().numpy()


def compute_features(folder, student, images, loading, precision, source):
    """Extract the Features of QueryGallery, and write them to features_zero.pickle in `folder`, for all processes.

    source: what they depend on, see `source_of`. An extraction that was killed goes on where it was.
    Raises FloatingPointError for features that are not finite.
    """
    unfinished = []

    def keep(title, share):
        of = f".{distributed.get_rank()}-of-{distributed.get_world_size()}" if distributed.get_world_size() > 1 else ""
        part = PartialFeatures(folder / f".{title}{of}.unfinished", source, student.width, loading.batch_size)
        if part.done:
            log_rank0(f"features: {part.done:,} of {share.stop - share.start:,} {title} are there already, going on")
        unfinished.append(part)
        return part

    features = extract_all(student, images, loading, precision, keep)
    if features:
        if os.path.isfile(folder / FEATURES) and not is_ours(folder / FEATURES):
            (folder / FEATURES).replace(folder / f"{FEATURES}.old")
            log_rank0(f"features: the {FEATURES} that was there is now {FEATURES}.old")
        write_features(folder / FEATURES, features, source)
    distributed.any_rank(False)  # wait until process 0 has written the whole
    for part in unfinished:
        part.remove()
    return features or read_features(folder / FEATURES)[0]


def stored_features(folder, checkpoint, source):
    """Features of features_zero.pickle in `folder`, or None if there are none, or outdated ones; prints which.

    checkpoint: its path, or None to take the features whatever they were computed from; source: see `source_of`.
    """
    path = folder / FEATURES
    if not os.path.isfile(path):
        return None
    if checkpoint and (stale := why_stale(path, source, checkpoint)):
        log_rank0(f"features: {path} is {stale}, computing them anew")
        return None
    features, rescaled = read_features(path)
    log_rank0(f"features: {path}" + (", scaled to length 1" if rescaled else ""))
    return features


def source_of(checkpoint, model, size, precision, benchmark=None):
    """What features depend on, for the record beside them; without lists where there is no benchmark at hand."""
    source = {"checkpoint": sha256_of(checkpoint), "model": model, "input_size": size, "precision": precision}
    if benchmark is None:
        return source
    lists = {f"{kind} list": sha256_of(benchmark.path(kind, "zero")) for kind in ("photo", "sketch")}
    return source | lists | {"data_root": str(benchmark.root.resolve())}


def read_features(path):
    """Read a features_zero.pickle without trusting it. Returns (Features, whether it had to be normalised).

    Raises InputError if the file is refused, torn, of another form, or holds a feature that has no direction.
    """
    content = read_pickled_list(path, 4)
    if len(content) < 4:
        raise InputError(f"{path}: expected [gallery features, gallery labels, query features, query labels, ...]")
    parts, rescaled = [], False
    for name, values, labels in (("gallery", *content[:2]), ("query", *content[2:4])):
        values, labels = _numbers(values), _numbers(labels)
        if values is None or values.ndim != 2 or not values.size:
            raise InputError(f"{path}: {name} features must be an array of numbers (photos or sketches, values)")
        if labels is None or labels.reshape(-1).shape != values.shape[:1]:
            raise InputError(f"{path}: {name} labels must be one whole number for each of {len(values)} features")
        labels = labels.reshape(-1)
        if not np.isfinite(labels).all() or (labels % 1 != 0).any() or labels.min() < 0 or labels.max() > 10**9:
            raise InputError(f"{path}: {name} labels must be whole numbers, 0 or more")
        norms = np.sqrt(np.einsum("nd,nd->n", values, values, dtype=np.float64))
        if not np.isfinite(norms).all() or not norms.all():
            row = int(np.flatnonzero(~np.isfinite(norms) | (norms == 0))[0])
            raise InputError(
                f"{path}: {name} feature {row} is zero, or holds NaN or infinity; extract the features again"
            )
        # Features that have length 1 stay as they were published, to the bit.
        if np.abs(norms - 1).max() > 1e-3:
            values, rescaled = values / norms[:, None], True
        parts += [values.astype(np.float32, copy=False), labels.astype(np.int64)]
    features = Features(*parts)
    widths = features.gallery.shape[1], features.query.shape[1]
    if widths[0] != widths[1]:
        raise InputError(f"{path}: gallery features have {widths[0]} values, query features {widths[1]}")
    return features, rescaled


def write_features(path, features, source):
    """Write a features_zero.pickle in the authors' form, and beside it the `source` (JSON) it was computed from."""
    with atomic_write(path) as file:
        content = [features.gallery, features.gallery_labels, features.query, features.query_labels, None]
        pickle.dump(content, file, protocol=4)
    write_json(_sidecar(path), {"source": source, "sha256": sha256_of(path)})


def is_ours(path):
    """Whether the features at `path` are those that the record beside them speaks of."""
    return record(path).get("sha256") == sha256_of(path)


def why_stale(path, source, checkpoint):
    """Why features at `path` must not stand for `source` (see `write_features`), or None if they may.

    A pickle of somebody else's has no record of its source; it is stale if `checkpoint` is newer.
    """
    if is_ours(path):
        recorded = record(path).get("source", {})
        differing = [name for name, value in source.items() if recorded.get(name) != value]
        return f"computed with another {differing[0]}" if differing else None
    if path.stat().st_mtime < checkpoint.stat().st_mtime:
        return f"older than {checkpoint.name} beside it"
    return None


def features_record(folder):
    """Which features in `folder` a result was measured on, for results.json: {"features": ...}."""
    path = folder / FEATURES
    source = record(path).get("source") if is_ours(path) else None
    return {"features": {"file": str(path), "sha256": sha256_of(path), "source": source}}


def _sidecar(path):
    return Path(path).with_suffix(".json")


def record(path):
    """What `write_features` recorded beside the features at `path`: {"source", "sha256"}, or {}."""
    try:
        content = json.loads(_sidecar(path).read_text())
    except (OSError, ValueError, RecursionError):
        content = None
    content = content if isinstance(content, dict) else {}
    source = content.get("source")
    if not isinstance(source, dict) or any(isinstance(value, dict | list) for value in source.values()):
        content.pop("source", None)  # ours is flat
    return content


def _numbers(values):
    """`values` as an array of real numbers, or None if they are something else."""
    try:
        values = np.asarray(values)
    except ValueError:
        return None
    return values if values.dtype.kind in "biuf" else None
