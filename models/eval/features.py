"""Features of sketches (queries) and photos (gallery) of unseen classes: extracted, or read from features_zero.pickle.

features_zero.pickle  [gallery features (N, D) float32, gallery labels (N,), query features (Q, D), query labels (Q,),
                      None or a distance matrix, which is not read], as the authors publish it
features_zero.json    checkpoint, lists and options that our own pickle was computed from, to detect a stale one
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from datasets.loaders import evaluation_loader
from models.eval.inference import Inference
from utils import distributed
from utils.cli import InputError
from utils.distributed import bar_disabled, log_rank0
from utils.files import open_own, read_bytes, sha256_of, unused_name, write_json, write_pickle
from utils.safe_pickle import read_pickled_list

FEATURES = "features_zero.pickle"
SEEN_FEATURES = "features_seen.pickle"  # the same of held-back images of seen classes, for generalised retrieval


@dataclass(frozen=True)
class Features:
    """L2-normalised features, float32, and class labels, int64, as NumPy arrays."""

    gallery: np.ndarray  # (N, D)
    gallery_labels: np.ndarray  # (N,)
    query: np.ndarray  # (Q, D)
    query_labels: np.ndarray  # (Q,)
    names: list[str] | None = None  # of the classes, by label


def extract_all(student, images, loading, precision="fp32", open_partial=None):
    """Extract the Features of a QueryGallery; each rank extracts a part of the images. None on ranks other than 0.

    loading: LoaderOptions; precision: see models.networks.arithmetic. open_partial: a function of (title, slice of this
    rank) that returns the PartialFeatures to write batches to; without it an extraction that is killed starts anew.
    Raises FloatingPointError for features that are not finite.
    """
    arrays, inference = [], Inference(student, loading.device, precision)
    for files, title in images.items():
        share = distributed.rank_slice(len(files))
        partial = open_partial(title, share) if open_partial else None
        done = partial.done if partial else 0
        loader = evaluation_loader(files, loading, share.start + done, share.stop)
        batches = []
        for batch in extract(student, loader, loading.device, title, precision, done, inference):
            partial.add(batch) if partial else batches.append(batch)
        rows = partial.read() if partial else np.concatenate([*batches, np.empty((0, student.width), np.float32)])
        if not np.isfinite(rows).all():
            if partial:
                partial.remove()
            raise FloatingPointError(f"features of {title} are not finite")
        arrays += [distributed.gather_concat(rows), files.labels]
    return Features(*arrays) if distributed.get_rank() == 0 else None


def extract(student, loader, device, title="features", precision="fp32", done=0, inference=None):
    """Yield the L2-normalised features of each batch of `loader`: (n, D) float32 arrays.

    precision: see models.networks.arithmetic; title: of the progress bar; done: images that were extracted before;
    inference: the Inference of the student, if there is one. The progress bar names the slower stage: "reading", if the
    network waits for images for over a tenth of the time, or "network".
    """
    student.eval().to(memory_format=torch.channels_last)
    inference = inference or Inference(student, device, precision)
    total, batches = done + len(loader.dataset), (images for images, _ in loader)
    with tqdm(total=total, initial=done, desc=title, unit="image", leave=False, disable=bar_disabled()) as bar:
        start, waited = None, 0.0
        for rows in inference.features(batches, total):
            yield rows
            now = time.perf_counter()
            if start is None:  # the first batch, for which workers start
                start, waited = now, inference.waiting
            else:
                is_reading = inference.waiting - waited > 0.1 * (now - start)
                bar.set_postfix_str(f"slower: {'reading' if is_reading else 'network'}", refresh=False)
            bar.update(len(rows))


def compute_features(path, student, images, loading, precision, source):
    """Extract the Features of a QueryGallery and write them to a pickle at `path`; returned on all ranks.

    source: see `source_of`. An extraction that was killed is resumed. Raises FloatingPointError for features that are
    not finite.
    """
    partials = []

    def open_partial(title, share):
        size = distributed.get_world_size()
        suffix = f".{distributed.get_rank()}-of-{size}" if size > 1 else ""
        partial = PartialFeatures(
            path.parent / f".{title}{suffix}.unfinished", source, student.width, loading.batch_size
        )
        if partial.done:
            count = share.stop - share.start
            log_rank0(f"features: resuming, {partial.done:,} of {count:,} {title} are already extracted")
        partials.append(partial)
        return partial

    features = extract_all(student, images, loading, precision, open_partial)
    if features:
        if os.path.isfile(path) and not is_ours(path):
            former = unused_name(path.with_name(f"{path.name}.old"))
            path.replace(former)
            log_rank0(f"features: the former {path.name} is now {former.name}")
        write_features(path, features, source)
    distributed.any_rank(False)  # waits until rank 0 has written the file
    for partial in partials:
        partial.remove()
    return features or read_features(path)[0]


class PartialFeatures:
    """Features of an extraction in progress, in a hidden file, so that a killed extraction can be resumed.

    The file is a line of JSON with the source of the features, followed by the features, float32.
    """

    def __init__(self, path, source, width, batch_size):
        """Resume from the file at `path` if it has the same `source` (JSON) and `width`, else start anew."""
        self.path, self.width = path, width
        self.header = json.dumps([source, width]).encode() + b"\n"
        self.done = 0  # in whole batches, so that the remaining batches are the same as without an interruption
        if self._has_same_header():
            is_unit = np.abs(np.linalg.norm(self.read(), axis=1) - 1) < 0.01  # a disk failure can leave zeros
            self.done = int(np.append(is_unit, False).argmin()) // batch_size * batch_size
        with open_own(path, "r+b" if self.done else "wb") as file:
            if self.done:
                file.truncate(len(self.header) + 4 * width * self.done)
            else:
                file.write(self.header)

    def add(self, rows):
        """Append rows (n, width) float32; from here on they survive the process. Raises InputError if that fails."""
        try:
            with open_own(self.path, "ab") as file:
                file.write(rows.tobytes())
        except OSError as error:
            raise InputError(
                f"{self.path.parent}: features cannot be written ({error.strerror}); make room and start again, which "
                "resumes the extraction"
            ) from error

    def read(self):
        """All rows so far: (n, width) float32."""
        values = np.fromfile(self.path, np.float32, offset=len(self.header))
        return values[: len(values) // self.width * self.width].reshape(-1, self.width)

    def remove(self):
        """Delete the file."""
        self.path.unlink()

    def _has_same_header(self):
        try:
            with open_own(self.path) as file:
                return file.readline() == self.header
        except FileNotFoundError:
            return False


def stored_features(path, checkpoint, source):
    """Features of the pickle at `path`, or None if there is none or they are stale, which is printed.

    checkpoint: its path, or None for an untrained network; source: see `source_of`, or None for features of any source.
    """
    if not os.path.isfile(path):
        return None
    if source and (stale := why_stale(path, source, checkpoint)):
        log_rank0(f"features: {path} is {stale}, computing them anew")
        return None
    features, rescaled = read_features(path)
    log_rank0(f"features: {path}" + (", scaled to length 1" if rescaled else ""))
    return features


def source_of(digest, model, size, precision, benchmark=None, split="zero"):
    """The source of features, for features_zero.json: what they depend on; lists only where there is a benchmark.

    digest: what identifies the weights, such as the SHA-256 of a checkpoint; split: of the lists, "zero" for unseen
    classes or "test" for held-back images of seen ones.
    """
    source = {"checkpoint": digest, "model": model, "input_size": size, "precision": precision}
    if benchmark is None:
        return source
    lists = {f"{kind} list": sha256_of(benchmark.path(kind, split)) for kind in ("photo", "sketch")}
    return source | lists | {"data_root": str(benchmark.root.resolve())}


def read_features(path):
    """Read a features_zero.pickle as data, never as code. Returns (Features, whether they had to be normalised).

    Raises InputError if the file is refused, torn, of another form, or holds a feature that cannot be normalised.
    """
    content = read_pickled_list(path, 4)
    if len(content) < 4:
        raise InputError(f"{path}: expected [gallery features, gallery labels, query features, query labels, ...]")
    arrays, rescaled = [], False
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
        # Features of length 1 are used as they were published, to the bit.
        if np.abs(norms - 1).max() > 1e-3:
            values, rescaled = values / norms[:, None], True
        arrays += [values.astype(np.float32, copy=False), labels.astype(np.int64)]
    features = Features(*arrays)
    widths = features.gallery.shape[1], features.query.shape[1]
    if widths[0] != widths[1]:
        raise InputError(f"{path}: gallery features have {widths[0]} values, query features {widths[1]}")
    return features, rescaled


def write_features(path, features, source):
    """Write a features_zero.pickle in the authors' form, readable by any NumPy, and features_zero.json beside it."""
    content = [features.gallery, features.gallery_labels, features.query, features.query_labels, None]
    write_pickle(path, content, protocol=3)
    write_json(_sidecar(path), {"source": source, "sha256": sha256_of(path)})


def is_ours(path):
    """Whether the features at `path` are those of the record beside them, so that this project wrote them."""
    return record(path).get("sha256") == sha256_of(path)


def why_stale(path, source, checkpoint):
    """Why features at `path` cannot be used for `source` (see `source_of`), or None if they can.

    A pickle from elsewhere has no record of its source; it is stale if `checkpoint` is newer, or None.
    """
    if is_ours(path):
        recorded = record(path).get("source", {})
        differing = [name for name, value in source.items() if recorded.get(name) != value]
        return f"computed with another {differing[0]}" if differing else None
    if checkpoint is None:
        return "not recorded as that of this network"
    if path.stat().st_mtime < checkpoint.stat().st_mtime:
        return f"older than {checkpoint.name} beside it"
    return None


def features_record(folder):
    """The features of `folder`, as results.json records them: {"features": {"file", "sha256", "source"}}."""
    path = folder / FEATURES
    source = record(path).get("source") if is_ours(path) else None
    return {"features": {"file": str(path), "sha256": sha256_of(path), "source": source}}


def _sidecar(path):
    return Path(path).with_suffix(".json")


def record(path):
    """The record that `write_features` wrote beside the features at `path`: {"source", "sha256"}, or {}."""
    try:
        content = json.loads(read_bytes(_sidecar(path), 1 << 20))
    except (OSError, ValueError, RecursionError):  # InputError is a ValueError
        content = None
    content = content if isinstance(content, dict) else {}
    source = content.get("source")
    if not isinstance(source, dict) or any(isinstance(value, dict | list) for value in source.values()):
        content.pop("source", None)  # a record of this project is flat
    return content


def _numbers(values):
    """`values` as an array of real numbers, or None if they are something else."""
    try:
        values = np.asarray(values)
    except ValueError:
        return None
    return values if values.dtype.kind in "biuf" else None
