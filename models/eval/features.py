"""Features of unseen-class sketches (queries) and photos (gallery): computed, or read from a features_zero.pickle.

features_zero.pickle  [gallery features (N, D) float32, gallery labels (N,), query features (Q, D), query labels (Q,),
                      None or a distance matrix, which is not read], as the authors publish it
features_zero.json    what our own pickle was computed from, so that a stale one is never used silently
"""

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from datasets.files import InputError, read_pickle, write_json, write_whole
from datasets.images import normalise


@dataclass(frozen=True)
class Features:
    """L2-normalised features, float32, and class labels, int64, as NumPy arrays."""

    gallery: np.ndarray  # (N, D)
    gallery_labels: np.ndarray  # (N,)
    query: np.ndarray  # (Q, D)
    query_labels: np.ndarray  # (Q,)


@torch.inference_mode()
def extract(student, loader, device, title="features"):
    """Student features of all images of `loader`, L2-normalised: (n, D) float32 array."""
    student.eval()
    batches = []
    with tqdm(total=len(loader.dataset), desc=title, unit="image", leave=False, disable=None) as progress:
        for images, _ in loader:
            features = student.features(normalise(images.to(device, non_blocking=True)))
            batches.append(F.normalize(features, dim=1).float().cpu())
            progress.update(len(images))
    return torch.cat(batches).numpy()


def read_features(path):
    """Read a features_zero.pickle without trusting it. Returns (Features, whether it had to be normalised).

    Raises InputError if the file is refused, torn, of another form, or holds values that are not finite.
    """
    content = read_pickle(path)
    if not isinstance(content, list | tuple) or len(content) < 4:
        raise InputError(f"{path}: expected [gallery features, gallery labels, query features, query labels, ...]")
    try:
        gallery, query = (np.asarray(content[i], dtype=np.float32) for i in (0, 2))
        labels = [np.asarray(content[i]).reshape(-1) for i in (1, 3)]
        gallery_labels, query_labels = (values.astype(np.int64) for values in labels)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: features and labels must be arrays of numbers ({error})") from None
    for name, values, integers in (("gallery", gallery, gallery_labels), ("query", query, query_labels)):
        if values.ndim != 2 or not len(values) or len(values) != len(integers):
            raise InputError(f"{path}: {name} features {values.shape} do not match {len(integers)} labels")
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise InputError(
                f"{path}: {name} feature {row} holds NaN or infinity; extract the features again: --recompute"
            )
    if gallery.shape[1] != query.shape[1]:
        raise InputError(f"{path}: gallery features have {gallery.shape[1]} values, query features {query.shape[1]}")
    for name, raw, integers in (("gallery", labels[0], gallery_labels), ("query", labels[1], query_labels)):
        if (raw != integers).any() or (integers < 0).any():
            raise InputError(f"{path}: {name} labels must be whole numbers, 0 or more")
    normalised = [_unit(values) for values in (gallery, query)]
    rescaled = any(changed for _, changed in normalised)
    return Features(normalised[0][0], gallery_labels, normalised[1][0], query_labels), rescaled


def write_features(path, features, source):
    """Write a features_zero.pickle in the authors' form, and beside it the `source` (JSON) it was computed from."""
    with write_whole(path) as file:
        content = [features.gallery, features.gallery_labels, features.query, features.query_labels, None]
        pickle.dump(content, file, protocol=4)
    write_json(_sidecar(path), {"source": source, "sha256": digest(path)})


def why_stale(path, source, checkpoint):
    """Why features at `path` must not stand for `source` (see `write_features`), or None if they may.

    A pickle of somebody else's has no record of its source; it is stale if `checkpoint` is newer.
    """
    try:
        record = json.loads(_sidecar(path).read_text())
    except (OSError, ValueError):
        record = {}
    if record.get("sha256") == digest(path):
        differing = [name for name, value in source.items() if record["source"].get(name) != value]
        return f"computed with another {differing[0]}" if differing else None
    if path.stat().st_mtime < checkpoint.stat().st_mtime:
        return f"older than {checkpoint.name} beside it"
    return None


def digest(path):
    """SHA-256 of a file, in hex."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def _sidecar(path):
    return Path(path).with_suffix(".json")


def _unit(values):
    """Rows of length 1: `values` themselves where they already are, so that published features stay as they were."""
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    if np.abs(norms - 1).max() < 1e-3:
        return values, False
    return values / np.maximum(norms, np.finfo(np.float32).tiny), True
