"""The index of photos on disk: validated when opened. Photos are added to it, or a new generation replaces it.

    index.json              number of the current generation, metadata, and sizes of the files
    features-3.npy ...      the arrays of generation 3, sorted by cell, see ARRAYS
    tail_features-3.bin ... photos added to generation 3, and which of all were removed, see TAIL_ARRAYS
    thumbnails-1.bin        small JPEGs, concatenated

photo_search.index_writer writes files, then replaces index.json. A file that grows is read up to its size in
index.json, and no other file changes, so readers of an earlier state are not affected. Nothing is unpickled. Needs
NumPy.
"""

import itertools
import json
import math
import mmap
import os
import re
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from photo_search import cells as search_cells
from photo_search.cells import Cells
from photo_search.folders import folders_of
from utils.cli import InputError, first_line
from utils.files import open_regular, read_bytes

INDEX_FILE, INDEX_FORMAT = "index.json", 2
OLDER_FORMATS = (1,)  # without TAIL_ARRAYS
MAX_INDEX_FILE_BYTES = 1 << 24
RECORD = np.dtype([
    ("size", "<i8"), ("mtime", "<i8"), ("digest", "u1", 32),  # of the file: bytes, nanoseconds, SHA-256
    ("path_end", "<i8"),  # end of its path in `paths`; it begins at the end of the path before
    ("thumbnail", "<i8"), ("thumbnail_size", "<i4"),  # bytes in the file of thumbnails
    ("fitted", "u1"),  # whether the clusters were fitted to a gallery with this photo
])  # fmt: skip
# Arrays of an index by the name of their file: dtype, dimensions, whether it is mapped into memory or read.
ARRAYS = {
    "features": ("<f4", 2, True), "outlines": ("<f4", 2, True), "centres": ("<f4", 2, False),
    "records": (RECORD, 1, False), "paths": ("u1", 1, False),
    "places": ("<i4", 1, False), "codebook": ("<f4", 3, False), "codes": ("<i4", 2, False),
    "ends": ("<i8", 1, False), "radii": ("<f4", 1, False), "basis": ("<f4", 2, False),
}  # fmt: skip
# Fields of Cells with another name than the file of their array, which is older.
CELLS_FIELDS = {"outlines": "pca_projection", "places": "path_order", "ends": "cell_ends", "basis": "pca_basis"}
# Arrays that grow, without header, in the order in which photos were added. There are none, or all.
TAIL_ARRAYS = {
    "tail_features": "<f4", "tail_records": RECORD, "tail_paths": "u1",
    "tail_codes": "<i4",  # nearest codebook entries
    "tail_places": "<i4",  # how many photos of the sorted arrays come before it in the order of paths
    "removed": "<i8",  # numbers of removed photos, those of the tail after all others
}  # fmt: skip
# Keys of index.json beside the files, and their types.
INDEX_METADATA = {
    "generation": int, "checkpoint": str, "sha256": str, "model": str, "imagenet_classes": int, "input_size": int,
    "width": int, "folders": list, "exclude": list,
}  # fmt: skip
THUMBNAILS_FILE = re.compile(r"thumbnails-\d+\.bin")


@dataclass(frozen=True)
class Index:
    """A snapshot of an index. Photos are numbered by row. Safe to use from several threads.

    Stored photos, those of `cells`, `records` and `stored_paths`, are numbered otherwise where photos were removed.
    """

    folder: Path
    metadata: dict  # index.json
    cells: Cells
    records: np.ndarray  # (stored photos,) of RECORD
    path_bytes: np.ndarray
    stored: np.ndarray  # (N,) int64, number of the stored photo of each row, ascending
    removed: np.ndarray  # int64, numbers of the other stored photos, in the order of their removal
    files: "_Files"

    def __len__(self):
        return len(self.stored)

    def path(self, row):
        """The absolute path of a photo."""
        return self.stored_path(self.stored[row])

    def stored_path(self, number):
        """The absolute path of a stored photo."""
        start = self.records["path_end"][number - 1] if number else 0
        return os.fsdecode(self.path_bytes[start : self.records["path_end"][number]].tobytes())

    def stored_paths(self):
        """The absolute paths of all stored photos: [str, ...]."""
        content, ends = self.path_bytes.tobytes(), [0, *self.records["path_end"].tolist()]
        return [os.fsdecode(content[start:end]) for start, end in itertools.pairwise(ends)]

    def thumbnail(self, row):
        """A photo as a small JPEG (bytes); b"" if the file of thumbnails is lost."""
        return self.stored_thumbnail(self.stored[row])

    def stored_thumbnail(self, number):
        """A stored photo as a small JPEG (bytes)."""
        record = self.records[number]
        return self.files.thumbnail(int(record["thumbnail"]), int(record["thumbnail_size"]))

    @property
    def has_thumbnails(self):
        """Whether the file of thumbnails is there, with its full size."""
        return self.files.thumbnails is not None

    @property
    def name(self):
        """The name in messages."""
        return str(self.folder)

    def nearest(self, features, k, weight, allowed=None):
        """See photo_search.cells.find_nearest. allowed: of `between`; None for all.

        Raises InputError if features are not finite, or a file has become shorter.
        """
        self.files.check_sizes()
        try:
            nearest = search_cells.find_nearest(self.cells, features, k, weight, allowed)
        except ValueError as error:
            raise damaged(self.folder, error) from None
        return nearest._replace(rows=self.stored.searchsorted(nearest.rows))

    def paths_of(self, rows):
        """The absolute paths of photos: [str, ...]."""
        return [self.path(row) for row in rows]

    def thumbnails_of(self, rows):
        """Photos as small JPEGs: [bytes, ...]."""
        return [self.thumbnail(row) for row in rows]

    def digests_of(self, rows):
        """Digests of files, the same for copies: [string, ...]."""
        return [self.records["digest"][number].tobytes().hex()[:32] for number in self.stored[rows]]

    def features_of(self, rows):
        """Features (n, D) of photos."""
        return self.stored_features(self.stored[rows])

    def stored_features(self, numbers):
        """Features (n, D) of stored photos (n,)."""
        self.files.check_sizes()
        return self.cells.features_of(np.asarray(numbers))

    def between(self, first, last):
        """The photos from first to last − 1 in the order of their paths, for `allowed` of `nearest`."""
        return (self.cells.path_order >= first) & (self.cells.path_order < last)

    def folders(self):
        """The Folders that a search can be limited to."""
        return folders_of(self)

    @property
    def clusters(self):
        """(M, K) of its codebook, or None without one."""
        return self.cells.codebook.shape[:2] if len(self.cells.codebook) else None

    @property
    def share_new(self):
        """The share of photos added after the clusters were fitted; 0 without clusters."""
        return 1 - float(self.records["fitted"][self.stored].mean()) if self.clusters else 0.0


def open_index(folder):
    """The Index in `folder`. Raises InputError if there is none, or it is damaged."""
    folder = Path(folder)
    while True:
        metadata = read_metadata(folder)
        try:
            return _open(folder, metadata)
        except PermissionError as error:
            raise InputError(f"{error.filename}: {error.strerror}; correct its permissions, or set --index") from None
        except Exception as error:  # damaged files can fail in any way
            if read_metadata(folder)["generation"] != metadata["generation"]:
                continue  # a writer has replaced it meanwhile
            raise damaged(folder, error) from error


def is_index(folder):
    """Whether there is an index in `folder`."""
    return os.path.lexists(Path(folder) / INDEX_FILE)


def damaged(folder, why):
    """The InputError for an index that cannot be read; why: an exception or text."""
    return InputError(
        f"{folder}: damaged index ({first_line(why, 200)}); delete the folder, and index the photos again"
    )


def read_metadata(folder):
    """The content of index.json, validated. Raises InputError."""
    try:
        metadata = json.loads(read_bytes(folder / INDEX_FILE, MAX_INDEX_FILE_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(folder / INDEX_FILE):
            raise InputError(f"{folder / INDEX_FILE}: a link that leads nowhere; delete it") from None
        raise InputError(
            f"{folder}: no index of photos; make one with search_photos.py index, or set --index"
        ) from None
    except OSError as error:
        raise InputError(f"{folder / INDEX_FILE}: {error.strerror}; correct its permissions, or set --index") from None
    except (ValueError, RecursionError) as error:
        raise damaged(folder, f"{INDEX_FILE}: {error}") from None
    if not has_fields(metadata, {**INDEX_METADATA, "format": int, "files": dict, "thumbnails": str}):
        raise damaged(folder, f"{INDEX_FILE} has missing or malformed entries")
    if metadata["format"] not in (INDEX_FORMAT, *OLDER_FORMATS):
        raise InputError(f"{folder}: an index of another version of this program; delete it, and index again")
    if not metadata["folders"] or not all(map(is_absolute_path, metadata["folders"])):
        raise damaged(folder, f"{INDEX_FILE} has no folders, or some that are not absolute paths")
    names = {f"{name}-{metadata['generation']}.npy" for name in ARRAYS} | {metadata["thumbnails"]}
    tail = {tail_file(name, metadata) for name in TAIL_ARRAYS}
    is_valid = (
        metadata["generation"] > 0 and THUMBNAILS_FILE.fullmatch(metadata["thumbnails"])
        and metadata["files"].keys() in (names, names | tail)
        and all(type(size) is int and 0 <= size < 2**63 for size in metadata["files"].values())
    )  # fmt: skip
    if not is_valid:
        raise damaged(folder, f"{INDEX_FILE} names other files")
    return metadata


def has_fields(metadata, wanted):
    """Whether a parsed value is a dict with the keys and types of `wanted`, and its lists contain strings."""
    return isinstance(metadata, dict) and all(
        type(metadata.get(name)) is kind and (kind is not list or all(type(each) is str for each in metadata[name]))
        for name, kind in wanted.items()
    )


def is_absolute_path(text):
    """Whether the system can have a file with this string as its absolute path."""
    try:
        return os.path.isabs(text) and b"\0" not in os.fsencode(text)
    except ValueError:  # a character that no file system encodes
        return False


def tail_file(name, metadata):
    """The file name of one of TAIL_ARRAYS."""
    return f"{name}-{metadata['generation']}.bin"


class _Files:
    """The files of an Index that stay open: those mapped into memory, and thumbnails, which are read."""

    def __init__(self):
        self.mapped = []  # [(name, mmap.mmap, bytes), ...]
        self.thumbnails, self.lock = None, threading.Lock()

    def map(self, file, size):
        """The first `size` bytes of a file as mmap.mmap."""
        mapping = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        self.mapped.append((file.name, mapping, size))
        return mapping

    def check_sizes(self):
        """Raise InputError if a file has become shorter: reading beyond its end would end this process by a signal."""
        for name, mapping, size in self.mapped:
            if mapping.size() < size:
                raise damaged(os.path.dirname(name), f"{os.path.basename(name)} has become shorter")

    def open_thumbnails(self, path, size):
        """Open the file of thumbnails unless it is missing, or shorter than `size`: a search works without it."""
        try:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size >= size:
                    self.thumbnails = os.dup(file.fileno())
                    weakref.finalize(self, os.close, self.thumbnails)
        except OSError:
            pass

    def thumbnail(self, start, size):
        """Bytes of the file of thumbnails; fewer if it has become shorter."""
        if self.thumbnails is None:
            return b""
        with self.lock:
            os.lseek(self.thumbnails, start, os.SEEK_SET)
            return os.read(self.thumbnails, size)


def _open(folder, metadata):
    files, sizes = _Files(), metadata["files"]
    arrays = {name: _read_array(folder, name, metadata, files) for name in ARRAYS}
    records, paths = arrays.pop("records"), arrays.pop("paths")
    cells = Cells(**{cells_field(name): array for name, array in arrays.items()})
    _check_cells(cells, metadata["width"])
    stored, removed = np.arange(len(records)), np.empty(0, np.int64)
    if tail_file("removed", metadata) in sizes:
        cells, records, paths, removed = _with_tail(folder, metadata, files, (cells, records, paths))
        stored = np.flatnonzero(cells.path_order >= 0)
    _check_records(records, len(cells.path_order), len(paths), sizes[metadata["thumbnails"]])
    files.open_thumbnails(folder / metadata["thumbnails"], sizes[metadata["thumbnails"]])
    return Index(folder, metadata, cells, records, paths, stored, removed, files)


def _read_array(folder, name, metadata, files):
    kind, dimensions, is_mapped = ARRAYS[name]
    path = folder / f"{name}-{metadata['generation']}.npy"
    with open_regular(path) as file:
        there, size = os.fstat(file.fileno()).st_size, metadata["files"][path.name]
        if there != size:
            raise ValueError(f"{path.name} has {there} bytes, not {size}")
        shape, kind = _read_header(file, kind), np.dtype(kind)
        start, count = file.tell(), math.prod(shape)
        if len(shape) != dimensions or start + count * kind.itemsize != size:
            raise ValueError(f"{path.name} holds other values")
        if is_mapped:
            return np.frombuffer(files.map(file, size), kind, count, start).reshape(shape)
        return np.frombuffer(file.read(), kind, count).reshape(shape)


def _read_header(file, kind):
    """The shape in the header of an .npy file; its data follows. Raises ValueError unless its dtype is `kind`.

    NumPy would parse the header as Python, which a damaged one makes fail in many ways.
    """
    start = file.read(10)
    header = file.read(int.from_bytes(start[8:], "little")).decode("latin-1")
    dtype = re.escape(repr(np.lib.format.dtype_to_descr(np.dtype(kind))))
    shape = re.fullmatch(rf"{{'descr': {dtype}, 'fortran_order': False, 'shape': \(([0-9, ]*)\), }} *\n", header)
    if start[:8] != b"\x93NUMPY\x01\x00" or not shape:
        raise ValueError(f"{os.path.basename(file.name)} holds other values")
    return tuple(int(size) for size in shape[1].split(",") if size.strip())


def _with_tail(folder, metadata, files, sorted_photos):
    """(Cells, records, bytes of paths) with the tail, and the removed photos."""
    cells, records, paths = sorted_photos
    tail = {name: _read_tail(folder, name, metadata, files) for name in TAIL_ARRAYS}
    count, (subspaces, words, _) = len(tail["tail_records"]), cells.codebook.shape
    features = tail["tail_features"].reshape(-1, metadata["width"])
    codes = tail["tail_codes"].reshape(count, subspaces)
    tail_records, places, removed = tail["tail_records"].copy(), tail["tail_places"], tail["removed"]
    ends = np.diff(tail_records["path_end"], prepend=0)
    fit = (
        len(features) == len(places) == count and (codes >= 0).all() and (codes < words).all()
        and (places >= 0).all() and (places <= len(records)).all()
        and (ends > 0).all() and ends.sum() == len(tail["tail_paths"])
        and (removed >= 0).all() and (removed < len(records) + count).all() and len(np.unique(removed)) == len(removed)
    )  # fmt: skip
    if not fit or len(removed) == len(records) + count:
        raise ValueError("its added photos do not fit together")
    starts, content = tail_records["path_end"] - ends, tail["tail_paths"].tobytes()
    names = [content[start:end] for start, end in zip(starts.tolist(), tail_records["path_end"].tolist(), strict=True)]
    order = search_cells.merge_path_order(cells.path_order, places, names, removed)
    tail_records["path_end"] += len(paths)
    cells = replace(cells, path_order=order, tail_features=features, tail_codes=codes)
    records, paths = np.concatenate([records, tail_records]), np.concatenate([paths, tail["tail_paths"]])
    return cells, records, paths, removed


def _read_tail(folder, name, metadata, files):
    kind, path = np.dtype(TAIL_ARRAYS[name]), folder / tail_file(name, metadata)
    with open_regular(path) as file:
        there, size = os.fstat(file.fileno()).st_size, metadata["files"][path.name]
        if there < size or size % kind.itemsize:  # a writer appends to it
            raise ValueError(f"{path.name} has {there} bytes, not {size}")
        if name == "tail_features" and size:
            return np.frombuffer(files.map(file, size), kind)
        return np.frombuffer(file.read(size), kind)


def _check_cells(cells, width):
    """Raise ValueError unless the arrays of Cells are consistent."""
    check_table(cells, width)
    count = len(cells.features)
    fit = (
        cells.cell_ends[-1] == count and cells.features.shape == (count, width)
        and np.array_equal(np.sort(cells.path_order), np.arange(count))
        and cells.pca_projection.shape == (count, len(cells.pca_basis) + 1)
    )  # fmt: skip
    if not fit:
        raise ValueError("its parts do not fit together")


def check_table(cells, width):
    """Raise ValueError unless the arrays of cells, in Cells, are consistent."""
    for name in ("codebook", "codes", "ends", "centres", "radii", "basis"):
        kind, dimensions, _ = ARRAYS[name]
        if (array := getattr(cells, cells_field(name))).dtype != kind or array.ndim != dimensions:
            raise ValueError(f"{name} holds other values")
    number, (parts, words, own) = len(cells.cell_ends), cells.codebook.shape
    fit = (
        number > 0 and (np.diff(cells.cell_ends, prepend=0) > 0).all()
        and (parts == 0 or parts * own == width) and cells.codes.shape == (number, parts)
        and (parts == 0 or (cells.codes.min() >= 0 and cells.codes.max() < words))
        and cells.radii.shape == (number,)
        and cells.centres.shape == (number, len(cells.pca_basis) + 1)
        and cells.pca_basis.shape[1] == width
        and all(np.isfinite(each).all() for each in (cells.codebook, cells.centres, cells.radii, cells.pca_basis))
    )  # fmt: skip
    if not fit:
        raise ValueError("its parts do not fit together")


def cells_field(name):
    """The field of Cells that holds the array of a file."""
    return CELLS_FIELDS.get(name, name)


def _check_records(records, count, paths, thumbnails):
    starts, sizes = records["thumbnail"], records["thumbnail_size"]
    ends = np.diff(records["path_end"], prepend=0)
    fit = (
        len(records) == count and (ends > 0).all() and records["path_end"][-1] == paths
        and (starts >= 0).all() and (sizes > 0).all() and (starts <= thumbnails - sizes).all()
    )  # fmt: skip
    if not fit:
        raise ValueError("its photos do not fit together")
