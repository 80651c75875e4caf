"""Features of unseen-class sketches (queries) and photos (gallery): computed, or read from a features_zero.pickle.

features_zero.pickle  [gallery features (N, D) float32, gallery labels (N,), query features (Q, D), query labels (Q,),
                      None or a distance matrix, which is not read], as the authors publish it
features_zero.json    what our own pickle was computed from, so that a stale one is never used silently
"""

import json
import pickle
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from datasets.errors import InputError
from datasets.files import digest, write_json, write_whole
from datasets.images import normalise
from datasets.pickles import read_pickled_list
from models import parallel
from models.networks import arithmetic


@dataclass(frozen=True)
class Features:
    """L2-normalised features, float32, and class labels, int64, as NumPy arrays."""

    gallery: np.ndarray  # (N, D)
    gallery_labels: np.ndarray  # (N,)
    query: np.ndarray  # (Q, D)
    query_labels: np.ndarray  # (Q,)


class Unfinished:
    """Features of a list of images as they are extracted, in a hidden file, so that a killed extraction goes on.

    The file holds a line of JSON, which says what the features depend on, and then the features, float32.
    """

    def __init__(self, path, source, width, batch_size):
        """Go on with the file at `path` if it is of the same `source` (JSON), else start anew."""
        self.path, self.width = path, width
        self.header = json.dumps([source, width]).encode() + b"\n"
        self.done = 0  # whole batches, so that the others are those of an uninterrupted extraction
        if self._is_same():
            rows = self.read()
            sound = np.abs(np.linalg.norm(rows, axis=1) - 1) < 0.01  # a torn disk can leave zeros
            self.done = int(np.append(sound, False).argmin()) // batch_size * batch_size
        with open(path, "r+b" if self.done else "wb") as file:
            if self.done:
                file.truncate(len(self.header) + 4 * width * self.done)
            else:
                file.write(self.header)

    def add(self, rows):
        """Append rows (n, width) float32; they outlive the process from here on."""
        with open(self.path, "ab") as file:
            file.write(rows.tobytes())

    def read(self):
        """All rows so far: (n, width) float32."""
        values = np.fromfile(self.path, np.float32, offset=len(self.header))
        return values[: len(values) // self.width * self.width].reshape(-1, self.width)

    def remove(self):
        """Delete the file, once its features are somewhere else."""
        self.path.unlink()

    def _is_same(self):
        try:
            with open(self.path, "rb") as file:
                return file.readline() == self.header
        except FileNotFoundError:
            return False


def extract(student, loader, device, title="features", precision="fp32", done=0):
    """Yield the L2-normalised features of each batch of `loader`: (n, D) float32 arrays.

    precision: see models.networks.arithmetic; title and done, images that are there already, are the progress bar's.
    """
    student.eval().to(memory_format=torch.channels_last)
    total = done + len(loader.dataset)
    with tqdm(total=total, initial=done, desc=title, unit="image", leave=False, disable=parallel.bar()) as bar:
        for images, _ in loader:
            with torch.inference_mode(), arithmetic(precision, device):
                images = normalise(images.to(device, non_blocking=True))
                features = student.features(images.contiguous(memory_format=torch.channels_last))
                rows = F.normalize(features.float(), dim=1).cpu().numpy()
            yield rows
            bar.update(len(rows))


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
    with write_whole(path) as file:
        content = [features.gallery, features.gallery_labels, features.query, features.query_labels, None]
        pickle.dump(content, file, protocol=4)
    write_json(_sidecar(path), {"source": source, "sha256": digest(path)})


def is_ours(path):
    """Whether the features at `path` are those that the record beside them speaks of."""
    return record(path).get("sha256") == digest(path)


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


def _sidecar(path):
    return Path(path).with_suffix(".json")


def record(path):
    """What `write_features` recorded beside the features at `path`: {"source", "sha256"}, or {}."""
    try:
        content = json.loads(_sidecar(path).read_text())
    except (OSError, ValueError):
        content = None
    return content if isinstance(content, dict) else {}


def _numbers(values):
    """`values` as an array of real numbers, or None if they are something else."""
    try:
        values = np.asarray(values)
    except ValueError:
        return None
    return values if values.dtype.kind in "biuf" else None
