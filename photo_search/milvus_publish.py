"""Writes a copy of an index on disk to Milvus, atomically; see photo_search.milvus for its collections.

If the index has only grown since the last copy, a writer adds rows for the new photos, which present readers filter
out, and marks those of removed photos for later readers. Otherwise it writes all photos into a new collection. Then it
writes new metadata, points the alias to these, and drops what is not used any more. If it is killed, the old state
stays current, and the next writer does the same again.
"""

import base64
import hashlib
import itertools
import json
import re
import secrets
from pathlib import Path

import numpy as np
from pymilvus import DataType

from photo_search.cells import with_tail_cells
from photo_search.index import INDEX_METADATA, cells_field
from photo_search.index_writer import sorted_order
from photo_search.milvus import ABOUT, BATCH_ROWS, MARK, PARSE_ERRORS, VERSION, count_rows, read_about
from photo_search.milvus_about import CELL_ARRAYS, MILVUS_FORMAT, array_to_text
from utils.cli import InputError
from utils.files import folder_lock, read_bytes, write_json

MAX_TEXT_BYTES, PIECE_BYTES = 65_535, 60_000  # the limit of Milvus, and the size of a piece
NOT_GONE = 2**62  # the value of `gone` for a photo that was not removed


def check_own(server, folder):
    """Raise InputError if the collection is a copy of another index than that in `folder`."""
    name = server.current()
    if name and name.removesuffix(ABOUT).rsplit("_", 1)[0] != f"{server.collection}_{_mark(folder)}":
        raise InputError(
            f"{server.address}: holds the photos of another index than {folder}; name another --collection"
        )


def publish(server, index):
    """Make the collection a copy of an Index on disk; returns whether it was not one before.

    Raises InputError as check_own does, and if another process is publishing the same index.
    """
    with folder_lock(index.folder, "publishing"):
        check_own(server, index.folder)
        prefix = f"{server.collection}_{_mark(index.folder, make=True)}_"
        metadata = json.dumps(index.metadata, sort_keys=True).encode()
        name, old = prefix + hashlib.sha256(metadata).hexdigest()[:16], server.current()
        previous, photos = _previous(server, old, index), _Photos(index)
        if old in (name + ABOUT, name):  # `name` in the earlier format
            if previous:
                _clean_up(server, prefix, old, previous["photos"], photos)
            return False
        kept = () if old is None else (old, old.removesuffix(ABOUT), old.removesuffix(ABOUT) + ABOUT)
        _drop(server, prefix, {*kept, previous["photos"] if previous else ""})
        if previous:
            _write_changes(server, previous, photos)
        else:
            _write_photos(server, name, photos)
        collection = previous["photos"] if previous else name
        _check_count(server, collection, photos)
        _write_about(server, name + ABOUT, photos, collection)
        _point(server, name + ABOUT, old)
        _clean_up(server, prefix, name + ABOUT, collection, photos)
        return True


class _Photos:
    """The photos of an Index with their keys, see photo_search.milvus. Stored photos are those of the Index."""

    def __init__(self, index):
        self.index, count = index, len(index.cells.features)
        self.count, self.end = count, len(index.records)
        self.table, tail_cells = with_tail_cells(index.cells)
        self.keys = np.append(sorted_order(index).astype(np.int64), np.arange(count, self.end))  # of stored photos
        self.cells = np.append(index.cells.cell_ends.searchsorted(np.arange(count), side="right"), tail_cells)
        self.removed = index.removed  # stored photos, in the order of their removal

    def rows(self, numbers, gone=None):
        """Yield batches of rows for Milvus of stored photos; gone: their removals, for photos to be removed."""
        for start in range(0, len(numbers), BATCH_ROWS):
            chosen = numbers[start : start + BATCH_ROWS]
            until = gone[start : start + BATCH_ROWS] if gone is not None else [NOT_GONE] * len(chosen)
            features = self.index.stored_features(chosen)
            yield [self._row(*each) for each in zip(chosen.tolist(), features, until, strict=True)]

    def _row(self, number, feature, gone):
        thumbnail = base64.b64encode(self.index.stored_thumbnail(number)).decode()
        return {
            "row": int(self.keys[number]), "cell": int(self.cells[number]), "gone": int(gone),
            "path": json.dumps(self.index.stored_path(number)),
            "thumbnail": thumbnail if len(thumbnail) <= MAX_TEXT_BYTES else "", "feature": feature,
        }  # fmt: skip


def _previous(server, name, index):
    """What the last copy holds, if the Index has only grown since then: dict with "photos", "added" and "gone".

    Else None.
    """
    if not name or not name.endswith(ABOUT):
        return None
    try:
        content = json.loads(read_about(server, name))
        facts, photos, copied = content["facts"], content["photos"], content["copied"]
        is_same = facts["format"] == MILVUS_FORMAT and facts["generation"] == index.metadata["generation"]
        added, gone = (int(copied[name]) for name in ("added", "gone"))
        is_older = content["sorted"] == len(index.cells.features) and added >= 0 and 0 <= gone <= len(index.removed)
        if is_same and is_older and added <= len(index.cells.tail_features) and copied["codebook"] == _digest(index):
            return {"photos": photos, "added": added, "gone": gone} if server.call("has_collection", photos) else None
    except PARSE_ERRORS:
        pass
    return None


def _digest(index):
    """A hash of what photos of one generation share."""
    return hashlib.sha256(index.cells.codebook.tobytes() + index.cells.cell_ends.tobytes()).hexdigest()


def _write_changes(server, previous, photos):
    """Add photos to the collection of the last copy, and mark those that were removed since."""
    first = photos.count + previous["added"]
    gone = photos.removed[previous["gone"] :]
    added = np.setdiff1d(np.arange(first, photos.end), gone)
    unseen = gone[gone >= first]  # added and removed since the last copy; a killed writer may have left them
    if len(unseen):
        server.call_with_retries("delete", previous["photos"], filter=f"row in [{','.join(map(str, unseen))}]")
    gone = gone[gone < first]
    batches = itertools.chain(photos.rows(added), photos.rows(gone, [previous["gone"]] * len(gone)))
    _insert(server, previous["photos"], batches)


def _clean_up(server, prefix, about, collection, photos):
    """Drop what is not used by the current state, and delete the rows of removed photos."""
    _drop(server, prefix, {about, collection})
    if len(photos.removed):
        server.call_with_retries("delete", collection, filter=f"gone < {len(photos.removed)}")


def _point(server, name, old):
    """Make the alias lead to the collection `name` instead of `old`, which may be None."""
    if old:
        return server.call("alter_alias", name, server.collection)
    try:
        server.call("create_alias", name, server.collection)
    except InputError:  # another index may have set the alias meanwhile
        _drop(server, name.removesuffix(ABOUT).rsplit("_", 1)[0] + "_", {server.current()})
        raise


def _mark(folder, make=False):
    """The random id of an index folder, stored in milvus.json; None if there is none, unless `make`."""
    path = Path(folder) / "milvus.json"
    try:
        mark = json.loads(read_bytes(path, 1000))["mark"]
        if re.fullmatch(MARK, mark):
            return mark
    except (OSError, InputError, ValueError, KeyError, TypeError, RecursionError):
        pass
    if not make:
        return None
    mark = secrets.token_hex(4)
    write_json(path, {"mark": mark})
    return mark


def _drop(server, prefix, kept):
    """Drop all collections of an index but those in `kept`."""
    for each in server.call("list_collections"):
        if re.fullmatch(rf"{prefix}{VERSION}({ABOUT})?", each) and each not in kept:
            server.call_with_retries("drop_collection", each)


def _create(server, name, key, texts, numbers, vector):
    """Create a collection with int64 fields `key` and `numbers`, string fields, and a vector field (name, width)."""
    schema = server.client.create_schema(auto_id=False, enable_dynamic_field=False)
    schema.add_field(key, DataType.INT64, is_primary=True)
    for each in numbers:
        schema.add_field(each, DataType.INT64)
    for each in texts:
        schema.add_field(each, DataType.VARCHAR, max_length=MAX_TEXT_BYTES, mmap_enabled=True)  # on disk, not in memory
    schema.add_field(vector[0], DataType.FLOAT_VECTOR, dim=vector[1])
    params = server.client.prepare_index_params()
    params.add_index(vector[0], index_type="FLAT", metric_type="L2")
    for each in numbers:
        params.add_index(each, index_type="INVERTED")  # for filters
    # Readers see everything that was written before their request.
    more = {"schema": schema, "index_params": params, "consistency_level": "Strong"}
    server.call_with_retries("create_collection", name, **more)


def _insert(server, name, batches):
    for batch in batches:
        server.call_with_retries("upsert", name, batch)  # may be sent twice
    server.call_with_retries("flush", name)
    server.call_with_retries("load_collection", name)


def _write_about(server, name, photos, collection):
    index, table = photos.index, photos.table
    metadata = {**{fact: index.metadata[fact] for fact in INDEX_METADATA}, "format": MILVUS_FORMAT}
    tail_rows = np.full(photos.end - photos.count, -1)
    in_tail = index.cells.path_order[photos.count :] >= 0
    tail_rows[in_tail] = index.cells.path_order[photos.count :][in_tail]
    text = json.dumps({
        "facts": metadata, "table": {part: array_to_text(getattr(table, cells_field(part))) for part in CELL_ARRAYS},
        "folders": index.folders(), "photos": collection, "sorted": photos.count,
        "tail_rows": array_to_text(tail_rows), "removed": array_to_text(photos.keys[photos.removed]),
        "copied": {"added": len(tail_rows), "gone": len(photos.removed), "codebook": _digest(index)},
    })  # fmt: skip
    rows = [
        {"piece": piece, "text": text[start : start + PIECE_BYTES], "none": [0.0, 0.0]}
        for piece, start in enumerate(range(0, len(text), PIECE_BYTES))
    ]
    _create(server, name, "piece", ["text"], [], ("none", 2))  # Milvus requires a vector field
    _insert(server, name, (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)))


def _write_photos(server, name, photos):
    index = photos.index
    _create(server, name, "row", ["path", "thumbnail"], ["cell", "gone"], ("feature", index.metadata["width"]))
    order = index.stored[np.argsort(index.cells.path_order[index.stored])]
    _insert(server, name, photos.rows(order))


def _check_count(server, name, photos):
    visible = f"row < {photos.end} and gone >= {len(photos.removed)}"
    if (count := count_rows(server, name, visible)) != len(photos.index):
        wanted = len(photos.index)
        raise InputError(f"{server.address}: stored {count:,} of {wanted:,} photos; see its log, and index again")
