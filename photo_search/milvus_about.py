"""What an index in Milvus holds beside its photos, as one text of JSON: metadata, table of cells, folders and keys."""

import base64
import io
import json
import re

import numpy as np

from photo_search.cells import Cells
from photo_search.folders import MAX_FOLDER_DEPTH, Folder
from photo_search.index import INDEX_METADATA, cells_field, check_table, has_fields
from photo_search.remote_search import MAX_PHOTOS_PER_REQUEST

MILVUS_FORMAT = 2
FORMAT_WITHOUT_TAIL = 1  # an alias leads to the photos
CELL_ARRAYS = ("codebook", "codes", "ends", "centres", "radii", "basis")  # names, as in index.ARRAYS


def array_to_text(array):
    """An array as text, of which `array_of_text` makes it again."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
    return base64.b64encode(file.getvalue()).decode()


def array_of_text(text):
    """The array of `array_to_text`. Raises any of milvus.PARSE_ERRORS."""
    return np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False)


def parse_about(text, photos):
    """(name of the photos, metadata, Cells, [Folder, ...], keys, sorted keys, filter) of such a text, checked.

    photos: the name, where the text has none. Raises any of milvus.PARSE_ERRORS.
    """
    content = json.loads(text)
    metadata, texts = content["facts"], content["table"]
    is_known = has_fields(metadata, {**INDEX_METADATA, "format": int}) and metadata["format"] in (
        MILVUS_FORMAT, FORMAT_WITHOUT_TAIL
    )  # fmt: skip
    if not is_known:
        raise ValueError("it was made by another version of this program")
    table = {part: array_of_text(texts[part]) for part in CELL_ARRAYS}
    fields = {cells_field(name): array for name, array in table.items()}
    cells = Cells(**fields, features=_empty(2), pca_projection=_empty(2), path_order=_empty(1))
    check_table(cells, metadata["width"])
    if np.diff(cells.cell_ends, prepend=0).max() > MAX_PHOTOS_PER_REQUEST:
        raise ValueError("its cells are too large")
    stored = int(cells.cell_ends[-1])
    sorted_keys, keys, visible = stored, np.arange(stored), ""
    if metadata["format"] != FORMAT_WITHOUT_TAIL:
        if not re.fullmatch(re.escape(photos.rsplit("_", 2)[0]) + "_[0-9a-f]{8}_[0-9a-f]{16}", content["photos"]):
            raise ValueError("the name of its photos is that of other ones")
        photos, sorted_keys = content["photos"], content["sorted"]
        tail, removed = (array_of_text(content[name]) for name in ("tail_rows", "removed"))
        keys = _keys(sorted_keys, tail, removed, stored)
        visible = f"row < {stored} and gone >= {len(removed)}"
    folders = [Folder(*values) for values in content["folders"]]
    for name, depth, first, last in folders:
        numbers = (
            int64_in_range([depth], MAX_FOLDER_DEPTH + 1),
            int64_in_range([first, last], len(keys) + 1),
        )
        if type(name) is not str or any(each is None for each in numbers):
            raise ValueError("malformed folder list")
        if first >= last:
            raise ValueError("a folder without photos")
    return photos, metadata, cells, folders, keys, sorted_keys, visible


def _keys(sorted_keys, tail, removed, stored):
    """The keys of the photos in the order of their paths (N,). Raises ValueError unless they are possible.

    sorted_keys: how many keys are in the order of paths; tail: the row of each later key, -1 for removed photos;
    removed: keys of removed photos; stored: the number of keys.
    """
    count = stored - len(removed)
    fit = (
        type(sorted_keys) is int and sorted_keys + len(tail) == stored and count > 0
        and tail.dtype == removed.dtype == np.int64 and tail.ndim == removed.ndim == 1
        and len(np.unique(removed)) == len(removed) and ((removed >= 0) & (removed < stored)).all()
    )  # fmt: skip
    if not fit:
        raise ValueError("malformed lists of added and removed photos")
    kept = np.ones(stored, bool)
    kept[removed] = False
    rows, later = tail[tail >= 0], np.flatnonzero(kept[sorted_keys:]) + sorted_keys
    if len(rows) != len(later) or len(np.unique(rows)) != len(rows) or (rows >= count).any():
        raise ValueError("malformed list of added photos")
    keys, is_sorted = np.empty(count, np.int64), np.ones(count, bool)
    keys[rows], is_sorted[rows] = np.flatnonzero(tail >= 0) + sorted_keys, False
    keys[is_sorted] = np.flatnonzero(kept[:sorted_keys])
    return keys


def _empty(dimensions):
    return np.empty((0,) * dimensions, np.float32)


def int64_in_range(values, end):
    """`values` as (n,) int64 if all are whole numbers from 0 to end − 1; else None."""
    if not all(type(value) is int and 0 <= value < end for value in values):
        return None
    return np.array(values, np.int64)
