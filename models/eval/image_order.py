"""Which images features belong to, in the order of the lists that the features were computed from.

The labels of features are not enough: two lists of the same images can have them in another order within a class. File
names and pictures are shown only where the record of the features names their lists, or where the user does.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from datasets.lists import find_layout, open_benchmark
from models.eval.features import is_ours, record
from utils.cli import InputError
from utils.files import sha256_of

UNKNOWN = (
    "note: the features do not record which lists they follow, so there are numbers in place of file names and no "
    "retrievals.png; --order names a folder of lists in their order"
)


def same_lists(path, benchmark, split="zero"):
    """Whether the record of the features at `path` has the digests of the lists of `split` in a Benchmark."""
    source = record(path).get("source", {}) if is_ours(path) else {}
    return all(source.get(f"{kind} list") == sha256_of(benchmark.path(kind, split)) for kind in ("photo", "sketch"))


def open_order(folder):
    """(Benchmark, QueryGallery) of a folder of lists of any known layout, the value of --order."""
    folder = Path(folder).absolute()
    protocol, name = find_layout(folder.parent, folder.name)
    benchmark = open_benchmark(protocol, folder.parent, name)
    return benchmark, benchmark.read_query_gallery()


def in_order_of(features, folder):
    """(Features with the class names of the lists in `folder`, their QueryGallery).

    Raises InputError if the lists have another number of images, or group them into other classes.
    """
    benchmark, images = open_order(folder)
    pairs = set()
    for (files, title), labels in zip(images.items(), (features.gallery_labels, features.query_labels), strict=True):
        if len(files) != len(labels):
            raise InputError(
                f"--order {folder}: lists {len(files):,} {title}, the features are of {len(labels):,}; name their lists"
            )
        pairs |= set(zip(labels.tolist(), files.labels.tolist(), strict=True))
    own, listed = dict(pairs), {label for _, label in pairs}
    if not len(pairs) == len(own) == len(listed):
        raise InputError(f"--order {folder}: its images have other classes than the features; name their lists")
    names = [benchmark.unseen_names[own[label]] if label in own else str(label) for label in range(max(own) + 1)]
    return replace(features, names=names), images


def numbered(labels):
    """(names, labels from 0 in the order of names) of class labels: two arrays, both of whole numbers or of text."""
    names, index = np.unique(np.concatenate(labels), return_inverse=True)
    return [str(name) for name in names], np.split(index.astype(np.int64), [len(labels[0])])
