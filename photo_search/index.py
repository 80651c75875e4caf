"""The index of photos on disk: validated when opened, and replaced atomically.

    index.json           number of the current generation, metadata, and sizes of the files
    features-3.npy ...   the arrays of generation 3, see ARRAYS
    thumbnails-1.bin     small JPEGs, concatenated; later generations append

A writer adds the files of a new generation, then replaces index.json; readers of the old generation are not affected.
Nothing is unpickled. Needs NumPy.
"""

import contextlib
import json
import mmap
import os
import re
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import NamedTuple

import numpy as np

from photo_search import cells as search_cells
from photo_search.cells import BLOCK_FEATURES, Cells
from utils.cli import InputError
from utils.files import write_json
from utils.sampling import evenly_spaced

INDEX_FILE, INDEX_FORMAT = "index.json", 1
MAX_FOLDERS, MAX_FOLDER_DEPTH = 2000, 40  # of the folders that a search can be limited to
RECORD = np.dtype([
    ("size", "<i8"), ("mtime", "<i8"), ("digest", "u1", 32),  # of the file: bytes, nanoseconds, SHA-256
    ("path_end", "<i8"),  # end of its path in `paths`; it begins at the end of the path before
    ("thumbnail", "<i8"), ("thumbnail_size", "<i4"),  # bytes in the file of thumbnails
    ("fitted", "u1"),  # whether the clusters were fitted to a gallery with this photo
])  # fmt: skip
# Arrays of an index by the name of their file: dtype, dimensions, whether it is mapped into memory or read.
ARRAYS = {
    "features": ("<f4", 2, True), "outlines": ("<f4", 2, True), "centres": ("<f4", 2, False),
    "records": (RECORD, 1, True), "paths": ("u1", 1, True),
    "places": ("<i4", 1, False), "codebook": ("<f4", 3, False), "codes": ("<i4", 2, False),
    "ends": ("<i8", 1, False), "radii": ("<f4", 1, False), "basis": ("<f4", 2, False),
}  # fmt: skip
# Fields of Cells with another name than the file of their array, which is older.
CELLS_FIELDS = {"outlines": "pca_projection", "places": "path_order", "ends": "cell_ends", "basis": "pca_basis"}
# Keys of index.json beside the files, and their types.
INDEX_METADATA = {
    "generation": int, "checkpoint": str, "sha256": str, "model": str, "imagenet_classes": int, "input_size": int,
    "width": int, "folders": list, "exclude": list,
}  # fmt: skip
# What damaged files raise; NumPy parses the header of an array as Python.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, OverflowError, EOFError, SyntaxError, TokenError, MemoryError)
_OURS = re.compile(
    rf"({'|'.join(ARRAYS)})-\d+\.npy|thumbnails-\d+\.bin|\.({re.escape(INDEX_FILE)}|unfinished\.json)\..*"
)


@dataclass(frozen=True)
class Index:
    """A snapshot of an index. Photos are numbered by row. Safe to use from several threads."""

    folder: Path
    metadata: dict  # index.json
    cells: Cells
    records: np.ndarray  # (N,) of RECORD
    paths: np.ndarray  # bytes
    thumbnails: mmap.mmap

    def __len__(self):
        return len(self.records)

    def path(self, row):
        """The absolute path of a photo."""
        start = self.records["path_end"][row - 1] if row else 0
        return os.fsdecode(self.paths[start : self.records["path_end"][row]].tobytes())

    def thumbnail(self, row):
        """A photo as a small JPEG (bytes)."""
        start = int(self.records["thumbnail"][row])
        return self.thumbnails[start : start + int(self.records["thumbnail_size"][row])]

    @property
    def name(self):
        """The name in messages."""
        return str(self.folder)

    def nearest(self, features, k, weight, allowed=None):
        """See photo_search.cells.find_nearest. Raises InputError if features are not finite."""
        try:
            return search_cells.find_nearest(self.cells, features, k, weight, allowed)
        except ValueError as error:
            raise _damaged(self.folder, error) from None

    def paths_of(self, rows):
        """The absolute paths of photos: [str, ...]."""
        return [self.path(row) for row in rows]

    def thumbnails_of(self, rows):
        """Photos as small JPEGs: [bytes, ...]."""
        return [self.thumbnail(row) for row in rows]

    def digests_of(self, rows):
        """Digests of files, the same for copies: [string, ...]."""
        return [self.records["digest"][row].tobytes().hex()[:32] for row in rows]

    def features_of(self, rows):
        """Features (n, D) of photos."""
        return self.cells.features[rows]

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
        return 1 - float(self.records["fitted"].mean()) if self.clusters else 0.0


def open_index(folder):
    """The Index in `folder`. Raises InputError if there is none, or it is damaged."""
    folder = Path(folder)
    while True:
        metadata = _read_metadata(folder)
        try:
            return _open(folder, metadata)
        except _DAMAGE as error:
            if _read_metadata(folder)["generation"] != metadata["generation"]:
                continue  # a writer has replaced it meanwhile
            raise _damaged(folder, error) from error


def is_index(folder):
    """Whether there is an index in `folder`."""
    return (Path(folder) / INDEX_FILE).is_file()


def _damaged(folder, why):
    text = str(why).splitlines()[0][:200] if str(why) else type(why).__name__
    return InputError(f"{folder}: damaged index ({text}); delete the folder, and index the photos again")


def _read_metadata(folder):
    """The content of index.json, validated. Raises InputError."""
    try:
        metadata = json.loads((folder / INDEX_FILE).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder}: no index of photos; make one with search_photos.py index, or set --index"
        ) from None
    except OSError as error:
        raise InputError(f"{folder / INDEX_FILE}: {error.strerror}; correct its permissions, or set --index") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"{INDEX_FILE}: {error}") from None
    if not has_fields(metadata, {**INDEX_METADATA, "format": int, "files": dict, "thumbnails": str}):
        raise _damaged(folder, f"{INDEX_FILE} has missing or malformed entries")
    if metadata["format"] != INDEX_FORMAT:
        raise InputError(f"{folder}: an index of another version of this program; delete it, and index again")
    names = {f"{name}-{metadata['generation']}.npy" for name in ARRAYS} | {metadata["thumbnails"]}
    if metadata["files"].keys() != names or any(not _OURS.fullmatch(name) for name in names):
        raise _damaged(folder, f"{INDEX_FILE} names other files")
    return metadata


def has_fields(metadata, wanted):
    """Whether a parsed value is a dict with the keys and types of `wanted`, and its lists contain strings."""
    return isinstance(metadata, dict) and all(
        type(metadata.get(name)) is kind and (kind is not list or all(type(each) is str for each in metadata[name]))
        for name, kind in wanted.items()
    )


def _open(folder, metadata):
    for name, size in metadata["files"].items():
        there = (folder / name).stat().st_size
        if there != size and not (name == metadata["thumbnails"] and there > size):  # a writer appends to it
            raise ValueError(f"{name} has {there} bytes, not {size}")
    arrays = {}
    for name, (kind, dimensions, mapped) in ARRAYS.items():
        path = folder / f"{name}-{metadata['generation']}.npy"
        array = np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)
        if array.dtype != kind or array.ndim != dimensions or not array.flags.c_contiguous:
            raise ValueError(f"{path.name} holds other values")
        arrays[name] = array.view(np.ndarray)
    records, paths = arrays.pop("records"), arrays.pop("paths")
    cells = Cells(**{cells_field(name): array for name, array in arrays.items()})
    _check_cells(cells, metadata["width"])
    _check_records(records, len(cells.features), len(paths), metadata["files"][metadata["thumbnails"]])
    with open(folder / metadata["thumbnails"], "rb") as file:
        thumbnails = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return Index(folder, metadata, cells, records, paths, thumbnails)


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
        and (starts >= 0).all() and (sizes > 0).all() and (starts + sizes <= thumbnails).all()
    )  # fmt: skip
    if not fit:
        raise ValueError("its photos do not fit together")


def write_index(folder, metadata, photos, rows, codebook):
    """Write a new generation of the index in `folder`. Only one process may write at a time.

    metadata: the content of index.json except "format", "generation" and "files"; "thumbnails" names an existing file.
    photos: (paths, records), bytes and RECORDs in the order of the paths. rows: a function from
    numbers (n,) of photos to their features (n, D). codebook: (M, K, D/M), M 0 for none.
    """
    paths, records = photos
    generation = _read_metadata(folder)["generation"] + 1 if is_index(folder) else 1
    names = {name: folder / f"{name}-{generation}.npy" for name in ARRAYS}
    blocks = range(0, len(paths), BLOCK_FEATURES)
    every = np.arange(len(paths))
    codes = np.concatenate(
        [search_cells.assign_codes(rows(every[start : start + BLOCK_FEATURES]), codebook) for start in blocks]
    )
    order, codes, ends = search_cells.sort_by_cell(codes)
    basis = search_cells.fit_pca_basis(rows(evenly_spaced(len(paths), 4 * BLOCK_FEATURES)))
    with open(names["features"], "wb") as features, open(names["outlines"], "wb") as outlines:
        _write_header(features, (len(paths), metadata["width"]))
        _write_header(outlines, (len(paths), len(basis) + 1))
        for start in blocks:
            block = rows(order[start : start + BLOCK_FEATURES])
            features.write(block.tobytes())
            outlines.write(search_cells.project_features(block, basis).tobytes())
    centres, radii = search_cells.bounding_spheres(np.load(names["outlines"], mmap_mode="r"), ends)
    records, paths = records[order], [paths[row] for row in order]
    records["path_end"] = np.cumsum([len(path) for path in paths])
    arrays = {
        "records": records, "paths": np.frombuffer(b"".join(paths), np.uint8), "places": order.astype(np.int32),
        "codebook": codebook, "codes": codes, "ends": ends, "centres": centres, "radii": radii, "basis": basis,
    }  # fmt: skip
    for name, array in arrays.items():
        with open(names[name], "wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    files = [*names.values(), folder / metadata["thumbnails"]]
    for path in files:
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
    sizes = {path.name: path.stat().st_size for path in files}
    write_json(folder / INDEX_FILE, {"format": INDEX_FORMAT, "generation": generation, **metadata, "files": sizes})


def _write_header(file, shape):
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def remove_old_generations(folder, keep=()):
    """Delete files of earlier generations and of interrupted writers in `folder`, except those named in `keep`."""
    current = _read_metadata(folder)["files"] if is_index(folder) else ()
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in current and path.name not in keep:
            with contextlib.suppress(OSError):  # Windows does not delete mapped files; the next writer tries again
                path.unlink()


_SEPARATOR = os.fsencode(os.sep)


class Folder(NamedTuple):
    """A folder with photos. In the order of all paths, its photos are consecutive."""

    name: str
    depth: int  # 0 for a folder of the index, 1 for one directly in it, and so on
    first: int  # its photos are those from first to last - 1 in the order of all paths
    last: int

    def rows(self, index):
        """Its photos, for `allowed` of the `nearest` of the index."""
        return index.between(self.first, self.last)


def folders_of(index):
    """The Folders of an Index, in the order of their paths, each before its subfolders, MAX_FOLDERS at most."""
    rows = np.argsort(index.cells.path_order)
    found = []

    def path(place):
        return os.fsencode(index.path(rows[place]))

    def add(prefix, depth, among):
        """Add a folder with photos in the range `among`, and its subfolders; returns the end of its photos."""
        after = prefix[:-1] + bytes([prefix[-1] + 1])
        first, last = (bisect_left(among, edge, key=path) + among.start for edge in (prefix, after))
        if first < last and len(found) < MAX_FOLDERS:
            found.append(Folder(readable(os.path.basename(prefix[:-1]) or prefix), depth, first, last))
            place = first
            while place < last and len(found) < MAX_FOLDERS:
                name, inside, _ = path(place).removeprefix(prefix).partition(_SEPARATOR)
                deeper = inside and depth < MAX_FOLDER_DEPTH
                place = add(prefix + name + inside, depth + 1, range(place, last)) if deeper else place + 1
        return last

    for root in filter(os.path.isabs, index.metadata["folders"]):
        add(os.path.join(os.fsencode(root), b""), 0, range(len(rows)))
    return found


def readable(path):
    """A path, or a part of one, as valid Unicode; other bytes become "�"."""
    return os.fsencode(path).decode("utf-8", "replace")
