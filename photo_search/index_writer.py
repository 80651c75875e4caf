"""Writes the index of photos on disk: a new generation, or photos that are added to the current one.

photo_search.index says what the files hold. index.json is replaced last, so a writer that is killed changes nothing;
the next one overwrites what it has left. Only one process may write at a time.
"""

import contextlib
import os
import re
from bisect import bisect_left

import numpy as np

from photo_search import cells as search_cells
from photo_search.cells import BLOCK_FEATURES
from photo_search.index import ARRAYS, INDEX_FILE, INDEX_FORMAT, TAIL_ARRAYS, is_index, read_metadata, tail_file
from utils.files import open_own, write_json
from utils.sampling import evenly_spaced

_OURS = re.compile(
    rf"({'|'.join(ARRAYS)})-\d+\.npy|({'|'.join(TAIL_ARRAYS)})-\d+\.bin|thumbnails-\d+\.bin|"
    rf"\.({re.escape(INDEX_FILE)}|unfinished\.json)\..*"
)


def write_index(folder, metadata, photos, rows, codebook):
    """Write a new generation of the index in `folder`.

    metadata: the content of index.json except "format", "generation" and "files"; "thumbnails" names an existing file.
    photos: (paths, records), bytes and RECORDs in the order of the paths. rows: a function from
    numbers (n,) of photos to their features (n, D). codebook: (M, K, D/M), M 0 for none.
    """
    paths, records = photos
    generation = read_metadata(folder)["generation"] + 1 if is_index(folder) else 1
    names = {name: folder / f"{name}-{generation}.npy" for name in ARRAYS}
    blocks = range(0, len(paths), BLOCK_FEATURES)
    every = np.arange(len(paths))
    codes = np.concatenate(
        [search_cells.assign_codes(rows(every[start : start + BLOCK_FEATURES]), codebook) for start in blocks]
    )
    order, codes, ends = search_cells.sort_by_cell(codes)
    basis = search_cells.fit_pca_basis(rows(evenly_spaced(len(paths), 4 * BLOCK_FEATURES)))
    with open_own(names["features"], "wb") as features, open_own(names["outlines"], "wb") as outlines:
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
        with open_own(names[name], "wb") as file:
            np.lib.format.write_array(file, array, allow_pickle=False)
    files = [*names.values(), folder / metadata["thumbnails"]]
    for path in files:
        _sync(path)
    sizes = {path.name: path.stat().st_size for path in files}
    _write_index_file(folder, {"generation": generation, **metadata}, sizes)


def append_to_index(old, metadata, photos, features, removed):
    """Add photos to the Index `old`, and remove others. What is written is in proportion to them.

    metadata, photos: as for write_index; features: (n, D) float32 of the photos; removed: numbers of stored photos.
    """
    paths, records = photos
    metadata = {"generation": old.metadata["generation"], **metadata}
    sizes = {metadata["thumbnails"]: (old.folder / metadata["thumbnails"]).stat().st_size}
    if len(paths) or len(removed):
        used = old.metadata["files"].get(tail_file("tail_paths", metadata), 0)
        records["path_end"] = used + np.cumsum([len(path) for path in paths])
        content = {
            "tail_features": features, "tail_records": records, "tail_paths": np.frombuffer(b"".join(paths), np.uint8),
            "tail_codes": search_cells.assign_codes(features, old.cells.codebook),
            "tail_places": _places(old, paths), "removed": removed,
        }  # fmt: skip
        for name, kind in TAIL_ARRAYS.items():
            sizes |= _append(old, name, np.ascontiguousarray(content[name], kind).tobytes())
        _sync(old.folder / metadata["thumbnails"])
    _write_index_file(old.folder, metadata, old.metadata["files"] | sizes)


def _append(old, name, content):
    """Append to one of the TAIL_ARRAYS of the Index `old`: {file name: size}."""
    path = old.folder / tail_file(name, old.metadata)
    used = old.metadata["files"].get(path.name, 0)
    with open_own(path, "ab") as file:
        file.truncate(used)  # a writer that was killed may have left more
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {path.name: used + len(content)}


def sorted_order(index):
    """Ranks of the paths of all photos of an Index but those of the tail, removed ones included: (n,)."""
    return np.load(index.folder / f"places-{index.metadata['generation']}.npy")


def _places(old, paths):
    """How many sorted photos of the Index `old` come before each path: (n,)."""
    stored = np.argsort(sorted_order(old))

    def path(place):
        return os.fsencode(old.stored_path(stored[place]))

    return np.array([bisect_left(range(len(stored)), each, key=path) for each in paths], np.int32)


def _sync(path):
    with open_own(path, "rb+") as file:
        os.fsync(file.fileno())


def _write_index_file(folder, metadata, sizes):
    write_json(folder / INDEX_FILE, {"format": INDEX_FORMAT, **metadata, "files": sizes})


def _write_header(file, shape):
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def is_of_index(name):
    """Whether an index has files with this name."""
    return bool(_OURS.fullmatch(name))


def remove_old_generations(folder, keep=()):
    """Delete files of earlier generations and of interrupted writers in `folder`, except those named in `keep`."""
    current = read_metadata(folder)["files"] if is_index(folder) else ()
    for path in folder.iterdir():
        if is_of_index(path.name) and path.name not in current and path.name not in keep:
            with contextlib.suppress(OSError):  # Windows does not delete mapped files; the next writer tries again
                path.unlink()
