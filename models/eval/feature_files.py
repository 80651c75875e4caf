"""Features of any method, read as data from the files that people have.

One file    .npz, .pt or .safetensors with the arrays gallery, gallery_labels, query, query_labels and, optionally,
            gallery_files and query_files (text); or a .pickle or .pt of a list of the first four
Four files  gallery features, gallery labels, query features, query labels: .npy, .pt or, for labels, .csv or .txt

Labels are whole numbers or class names. A .csv of labels has the label in its last column and, optionally, file names
in its first one; a line of column names that ends in "label" or "class" is left out.
"""

import csv
import io
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from datasets.lists import FileList, QueryGallery
from models.eval.features import Features
from models.eval.image_order import numbered
from utils.cli import InputError
from utils.files import npz_shapes, open_regular
from utils.memory import available_memory
from utils.safe_pickle import describe_pickle, read_pickled_list

ARRAY_NAMES = ("gallery", "gallery_labels", "query", "query_labels")
FILES = ("gallery_files", "query_files")
RANGE = 1e-15, 1e15  # of features whose squares float32 holds, with some digits to spare


class GivenFeatures(NamedTuple):
    """Features from files, and the images that they belong to."""

    features: Features  # named
    gallery_files: list[str] | None
    query_files: list[str] | None

    def images(self, root, sources):
        """The QueryGallery below the folder `root`; None without file names. sources: two paths, for messages."""
        if self.gallery_files is None or self.query_files is None:
            return None
        sides = (
            (sources[0], self.gallery_files, self.features.gallery_labels),
            (sources[1], self.query_files, self.features.query_labels),
        )
        return QueryGallery(
            *(
                FileList(Path(source), Path(root), files, labels, list(range(1, len(files) + 1)))
                for source, files, labels in sides
            )
        )


def read_any(paths, normalise=True):
    """Read GivenFeatures from one file or four, see the top of this module.

    normalise: scale each feature to length 1. Otherwise features far from 0, whose distances float32 would lose, are
    given less the gallery's mean. Raises InputError if a file cannot be read, has another form or number of rows, or
    holds a feature that is not finite, or of length 0 where it is to be scaled, or of values outside RANGE where not.
    """
    if len(paths) not in (1, 4):
        raise InputError(
            f"{len(paths)} files of features: give one, or four: gallery features, gallery labels, query features, "
            "query labels"
        )
    if len(paths) == 1:
        parts, where = _read_one(paths[0]), dict.fromkeys((*ARRAY_NAMES, *FILES), paths[0])
    else:
        files = dict(zip(FILES, (paths[1], paths[3]), strict=True))
        parts, where = {}, dict(zip(ARRAY_NAMES, paths, strict=True)) | files
        for name, path in where.items():
            if name in FILES:
                continue
            parts[name], files = _read_array(path, name)
            if files is not None:
                parts[name.replace("labels", "files")] = files
    rows, labels = [], []
    for side in ("gallery", "query"):
        rows.append(_rows(where[side], side, parts[side], normalise))
        labels.append(_labels(where[f"{side}_labels"], side, parts[f"{side}_labels"], len(rows[-1])))
    if rows[0].shape[1] != rows[1].shape[1]:
        raise InputError(
            f"{where['query']}: query features have {rows[1].shape[1]} values, gallery features {rows[0].shape[1]}"
        )
    if not normalise:
        given = [parts[side] for side in ("gallery", "query")]
        if _is_far_from_zero(rows[0]):
            mean = given[0].mean(axis=0, dtype=np.float64)
            given = rows = [(each - mean).astype(np.float32) for each in given]
        largest = max(max(float(each.max()), -float(each.min())) for each in given)
        if largest and not RANGE[0] <= largest <= RANGE[1]:
            raise InputError(
                f"{where['gallery']}: the largest value of a feature is {largest:g}, too "
                f"{'small' if largest < 1 else 'large'} for Euclidean distances; multiply all features by one number"
            )
    if labels[0].dtype.kind != labels[1].dtype.kind:
        raise InputError(
            f"{where['query_labels']}: labels of one side are numbers, of the other names; give both in one form"
        )
    names, (gallery_labels, query_labels) = numbered(labels)
    features = Features(rows[0], gallery_labels, rows[1], query_labels, names)
    files = [_files(where[name], name, parts.get(name), len(part)) for name, part in zip(FILES, rows, strict=True)]
    return GivenFeatures(features, *files)


def _read_one(path):
    """{name: array} of a file with all parts."""
    suffix = _suffix(path)
    if suffix in (".pickle", ".pkl"):
        content = read_pickled_list(path, 4)
    elif suffix == ".npz":
        content = _load(path)
    elif suffix in (".pt", ".pth", ".safetensors"):
        content = _read_torch(path)
    else:
        raise InputError(
            f"{path}: one file of features is a .npz, .pt, .safetensors or .pickle; of others give four: gallery "
            "features, gallery labels, query features, query labels"
        )
    if isinstance(content, list | tuple) and len(content) >= 4:
        content = dict(zip(ARRAY_NAMES, content[:4], strict=True))
    if not isinstance(content, dict) or any(content.get(name) is None for name in ARRAY_NAMES):
        held = ", ".join(map(str, content)) if isinstance(content, dict) else ""
        if suffix in (".pickle", ".pkl"):
            held = f"a {describe_pickle(path)}; docs/testing.md has the lines that save it as .npz"
        raise InputError(
            f"{path}: expected the arrays {', '.join(ARRAY_NAMES)}, or a list of them"
            + (f"; it holds {held[:600]}" if held else "")
        )
    return {
        name: _as_array(path, name, content[name]) for name in (*ARRAY_NAMES, *FILES) if content.get(name) is not None
    }


def _read_array(path, name):
    """(array, file names or None) of a file with one part."""
    suffix, is_label = _suffix(path), name.endswith("labels")
    if is_label and suffix in (".csv", ".txt"):
        return _read_csv(path)
    if suffix == ".npy":
        return _load(path), None
    if suffix in (".pt", ".pth"):
        return _as_array(path, name, _read_torch(path)), None
    way_out = ".npy, .pt or .csv" if is_label else ".npy or .pt"
    raise InputError(f"{path}: {name.replace('_', ' ')} of four files are a {way_out}")


def _suffix(path):
    return os.path.splitext(path)[1].lower()


def _load(path):
    """The array of a .npy, or {name: array} of a .npz; never a pickle."""
    try:
        with open_regular(path) as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                return content
            known = [name for name in content.files if name in (*ARRAY_NAMES, *FILES)]
            _check_arrays(path, npz_shapes(file, available_memory(), known))
            return {name: content[name] for name in known} or dict.fromkeys(content.files)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path}: larger than the memory, or damaged; free some memory, or save it again") from None
    except Exception as error:  # a damaged file can fail in any way
        if "allow_pickle" in str(error):
            way_out = "save class names as text: np.array(names, dtype=str)"
            raise InputError(f"{path}: holds Python objects, which are not read; {way_out}") from None
        reason = str(error).split("\n")[0]
        raise InputError(f"{path}: not a readable NumPy file ({reason}); save it again") from None


def _check_arrays(path, shapes):
    """Raise InputError if the numbers of rows and labels of an .npz differ; shapes: {name: shape}, not unpacked yet."""
    for side in ("gallery", "query"):
        rows, labels = shapes.get(side), shapes.get(f"{side}_labels")
        if rows and labels is not None:
            _check_count(path, side, math.prod(labels), rows[0])


def _read_torch(path):
    from models.torch_files import read_torch

    return read_torch(path)


def _read_csv(path):
    """(labels, file names or None) of a .csv, or of a .txt with one label a line."""
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row] if _suffix(path) == ".csv" else [
                [line.strip()] for line in file if line.strip()
            ]  # fmt: skip
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not readable as text ({error})") from None
    if rows and rows[0][-1].strip().lower() in ("label", "labels", "class"):
        rows = rows[1:]
    if not rows:
        raise InputError(f"{path}: no labels")
    if odd := next((number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])), None):
        raise InputError(f"{path}: row {odd} has {len(rows[odd - 1])} columns, the first has {len(rows[0])}")
    labels = np.array([row[-1].strip() for row in rows])
    if all(label.lstrip("-").isdecimal() and label.isascii() and len(label) < 18 for label in labels.tolist()):
        labels = labels.astype(np.int64)
    return labels, [row[0] for row in rows] if len(rows[0]) > 1 else None


def _as_array(path, name, value):
    """A part as an array of numbers or text."""
    try:
        if hasattr(value, "is_floating_point"):  # a tensor, which can be of a dtype that NumPy lacks
            value = value.detach().float().numpy() if value.is_floating_point() else value.detach().numpy()
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{path}: {name}: not an array ({str(error).splitlines()[0]})") from None


def _rows(path, side, values, normalise):
    """Features (n, D) float32 of one side, checked."""
    if values.ndim != 2 or values.dtype.kind not in "biuf":
        raise InputError(
            f"{path}: {side} features must be an array of numbers (images, values), not {values.dtype} {values.shape}"
        )
    if not values.size:
        raise InputError(f"{path}: there are no {side} features, their array is empty {values.shape}")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
        rows = values.astype(np.float32, copy=False)
    norms = _norms(rows)
    outside = ~np.isfinite(norms) | (norms < RANGE[0])
    if outside.any():
        largest = np.abs(values[outside].astype(np.float64)).max(axis=1, keepdims=True)
        if (unusable := ~np.isfinite(largest) | ((largest == 0) & normalise)).any():
            number, what = np.flatnonzero(outside)[unusable.argmax()], "holds NaN or infinity"
            what = f"is zero, or {what}" if normalise else what
            raise InputError(f"{path}: {side} feature {number} {what}; extract the features again")
        if normalise:  # in float32 they would be 0, infinite or rounded to a few bits
            rows = rows.copy()
            rows[outside] = values[outside] / largest
            norms = _norms(rows)
    # Features of length 1 are used as they are, to the bit.
    if normalise and np.abs(norms - 1).max() > 1e-3:
        rows = (rows / norms[:, None]).astype(np.float32)
    return rows


def _norms(rows):
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def _is_far_from_zero(rows):
    """Whether the mean of features (n, D) is 30 times as far from 0 as they are from it."""
    with np.errstate(invalid="ignore"):  # of infinite ones it is not
        mean = rows.mean(axis=0, dtype=np.float64)
        return mean @ mean > (1 - 1e-3) * (_norms(rows) ** 2).mean()


def _check_count(path, side, labels, count):
    if labels != count:
        raise InputError(f"{path}: {labels} {side} labels for {count} features; each feature needs one")


def _labels(path, side, labels, count):
    """Labels (n,) of one side, int64 or text, checked."""
    labels = labels.reshape(-1)
    _check_count(path, side, len(labels), count)
    if labels.dtype.kind == "S":
        labels = np.char.decode(labels, "utf-8", "replace")
    if labels.dtype.kind == "U":
        if (empty := np.char.strip(labels) == "").any():
            raise InputError(f"{path}: {side} label {int(empty.argmax())} is empty; each feature needs a class")
        return labels
    if labels.dtype.kind not in "biuf" or not np.isfinite(labels).all() or (labels % 1 != 0).any():
        raise InputError(f"{path}: {side} labels must be whole numbers or class names")
    if np.abs(labels).max() > 10**15:
        raise InputError(f"{path}: {side} labels must be whole numbers below 10^15 or class names")
    return labels.astype(np.int64)


def _files(path, name, files, count):
    """File names of one side, or None."""
    if files is None:
        return None
    files = [str(file) for file in np.asarray(files).reshape(-1).tolist()]
    if len(files) != count:
        raise InputError(f"{path}: {len(files)} {name} for {count} features")
    return files
