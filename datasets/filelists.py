"""The lists, class names and semantic masks of a benchmark folder, read with every line checked.

    <root>/<zero_version>/<list>.txt     one image a line: `relative/path with spaces.png 12`, labels 0..C-1
    <root>/<zero_version>/cname_cid.txt  seen classes, `class name 12`; cname_cid_zero.txt the unseen ones
    <root>/<zero_version>/cid_mask.pickle  {label: float64 vector (1000,)}, by Python 2 or 3

Reading never touches an image; `check_images` is the only function that looks for them.
"""

import os
import pickle
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from datasets.errors import InputError
from datasets.files import read_pickle, write_whole
from datasets.protocols import PROTOCOLS, Protocol


@dataclass(frozen=True)
class FileList:
    """Images of one kind and split: `paths` relative to `root`, `labels` (n,) int64."""

    source: Path  # the list file, for messages
    root: Path
    paths: list[str]
    labels: np.ndarray

    def __len__(self):
        return len(self.paths)


@dataclass(frozen=True)
class Benchmark:
    """A benchmark folder: where its lists lie and what its classes are called."""

    protocol: Protocol
    root: Path
    lists: Path  # root/zero_version
    seen_names: list[str]
    unseen_names: list[str]

    def read(self, kind, split):
        """FileList of `kind` ("sketch" or "photo") and `split` ("train", "test" for validation, or "zero")."""
        patterns = self.protocol.sketch_lists if kind == "sketch" else self.protocol.photo_lists
        names = [pattern.format(split) for pattern in patterns]
        path = next((self.lists / name for name in names if os.path.isfile(self.lists / name)), self.lists / names[0])
        classes = len(self.unseen_names if split == "zero" else self.seen_names)
        return read_list(path, self.root, classes)

    def read_mask(self, imagenet_classes=1000):
        """Semantic mask (seen classes, imagenet_classes) float32."""
        return read_mask(self.lists / "cid_mask.pickle", len(self.seen_names), imagenet_classes)


def open_benchmark(protocol_name, root=None, zero_version=None):
    """Open a benchmark folder laid out like `protocol_name`'s; `root` and `zero_version` default to the protocol's.

    Raises InputError if the folder, or a file of class names in it, is missing or malformed.
    """
    protocol = PROTOCOLS[protocol_name]
    root = Path(root or protocol.data_root)
    lists = root / (zero_version or protocol.zero_version)
    if not os.path.isdir(root):
        raise InputError(f"{root}: no such data folder; unpack {protocol.title} there or name another with --data_root")
    if not os.path.isdir(lists):
        raise InputError(f"{lists}: no such folder of lists; name the right one with --zero_version")
    seen, unseen = (read_class_names(lists / name) for name in ("cname_cid.txt", "cname_cid_zero.txt"))
    if both := sorted(set(seen) & set(unseen)):
        raise InputError(
            f"{lists}: {both[0]!r} is in cname_cid.txt and in cname_cid_zero.txt; unseen classes must be new"
        )
    return Benchmark(protocol, root, lists, seen, unseen)


def read_list(path, root, classes):
    """Read a list of images whose labels lie in 0..classes-1.

    Raises InputError naming file and line if the list is missing or empty, a line has no label or one out of range,
    or a path is absolute or climbs out of `root`.
    """
    paths, labels = [], []
    for number, line in _lines(path):
        name, label = _split_label(path, number, line)
        if label >= classes:
            raise InputError(
                f"{path}:{number}: label {label} is outside 0..{classes - 1}, the classes of cname_cid*.txt"
            )
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise InputError(f"{path}:{number}: {name!r} leaves the data folder; paths are relative to {root}")
        paths.append(name)
        labels.append(label)
    return FileList(Path(path), Path(root), paths, np.array(labels, dtype=np.int64))


def read_class_names(path):
    """Class names in the order of their labels. Raises InputError unless labels are 0..C-1 and no name comes twice."""
    names = {}
    for number, line in _lines(path):
        name, label = _split_label(path, number, line)
        if label in names:
            raise InputError(f"{path}:{number}: label {label} is already that of {names[label]!r}")
        if name in names.values():
            raise InputError(f"{path}:{number}: the class {name!r} already has a label")
        names[label] = name
    if sorted(names) != list(range(len(names))):
        missing = min(set(range(len(names))) - set(names))
        raise InputError(f"{path}: labels must be 0..{len(names) - 1}, but {missing} is missing")
    return [names[label] for label in range(len(names))]


def read_mask(path, classes, imagenet_classes=1000):
    """Semantic mask a (classes, imagenet_classes) float32, row c for seen class c.

    Raises InputError if the file is missing, refused or torn, lacks a class, or holds vectors of another length.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no semantic mask; fetch the one of this split, or train without it: --no_mask")
    mask = read_pickle(path)
    if not isinstance(mask, dict) or set(mask) != set(range(classes)):
        raise InputError(f"{path}: not a mask of the {classes} classes in cname_cid.txt; fetch the one of this split")
    try:
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused below
            rows = np.stack([np.asarray(mask[label], dtype=np.float64) for label in range(classes)]).astype(np.float32)
    except (TypeError, ValueError, OverflowError):
        rows = np.full((1, 1), np.nan)
    if rows.shape != (classes, imagenet_classes) or not np.isfinite(rows).all():
        raise InputError(f"{path}: every class needs a vector of {imagenet_classes} finite numbers (see --nb_classes)")
    return rows


def check_images(files):
    """Raise InputError naming list and line of the first image of FileList `files` that is not there."""
    for index, name in enumerate(files.paths):
        if not os.path.isfile(files.root / name):
            number = _lines(files.source)[index][0]
            raise InputError(
                f"{files.source}:{number}: no image {files.root / name}; unpack the data, or set --data_root"
            )


def write_list(path, rows):
    """Write (path or class name, label) rows as a list, or as a file of class names."""
    with write_whole(path) as file:
        file.write("".join(f"{name} {label}\n" for name, label in rows).encode())


def write_mask(path, mask):
    """Write mask (C, 1000) as the authors do: a pickled {label: float64 vector}."""
    with write_whole(path) as file:
        pickle.dump(dict(enumerate(np.asarray(mask, dtype=np.float64))), file, protocol=2)


def _lines(path):
    """Numbered lines of a text file that are not blank; Windows line ends and a byte-order mark are accepted."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such list; unpack the data, or see --data_root and --zero_version") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise InputError(f"{path}: the list is empty")
    return lines


def _split_label(path, number, line):
    name, _, label = line.rpartition(" ")
    if not name.strip() or not label.isascii() or not label.isdigit() or len(label) > 9:
        raise InputError(f"{path}:{number}: expected 'path label' with a whole number 0.. at the end, found {line!r}")
    return name.strip(), int(label)
