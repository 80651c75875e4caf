"""Writes a copy of an index on disk to Milvus, atomically; see photo_search.milvus for its collections.

A writer adds a new generation, points the alias to it, and drops the old one. If it is killed, the old generation stays
current, and the next writer drops the unfinished one.
"""

import base64
import hashlib
import io
import json
import re
import secrets
from pathlib import Path

import numpy as np
from pymilvus import DataType

from photo_search.index import INDEX_METADATA, cells_field
from photo_search.milvus import BATCH_ROWS, CELL_ARRAYS, GENERATION, MARK, MILVUS_FORMAT, count_rows
from utils.cli import InputError
from utils.files import folder_lock, write_json

MAX_TEXT_BYTES, PIECE_BYTES = 65_535, 60_000  # the limit of Milvus, and the size of a piece


def check_own(server, folder):
    """Raise InputError if the collection is a copy of another index than that in `folder`."""
    name = server.current()
    if name and name.rsplit("_", 1)[0] != f"{server.collection}_{_mark(folder)}":
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
        if name != old:
            _drop(server, prefix, old)
            _write_about(server, f"{name}_about", index)
            _write_photos(server, name, index)
            _point(server, name, old)
        _drop(server, prefix, name)
        return name != old


def _point(server, name, old):
    """Make `name` the current generation instead of `old`, which may be None."""
    if old:
        return server.call("alter_alias", name, server.collection)
    try:
        server.call("create_alias", name, server.collection)
    except InputError:  # another index may have set the alias meanwhile
        _drop(server, name.rsplit("_", 1)[0] + "_", server.current())
        raise


def _mark(folder, make=False):
    """The random id of an index folder, stored in milvus.json; None if there is none, unless `make`."""
    path = Path(folder) / "milvus.json"
    try:
        mark = json.loads(path.read_bytes())["mark"]
        if re.fullmatch(MARK, mark):
            return mark
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    if not make:
        return None
    mark = secrets.token_hex(4)
    write_json(path, {"mark": mark})
    return mark


def _drop(server, prefix, name):
    """Drop all generations but `name`."""
    for each in server.call("list_collections"):
        if re.fullmatch(rf"{prefix}{GENERATION}(_about)?", each) and each not in (name, f"{name}_about"):
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


def _write_about(server, name, index):
    table = {}
    for part in CELL_ARRAYS:
        file = io.BytesIO()
        np.lib.format.write_array(file, getattr(index.cells, cells_field(part)), allow_pickle=False)
        table[part] = base64.b64encode(file.getvalue()).decode()
    metadata = {**{fact: index.metadata[fact] for fact in INDEX_METADATA}, "format": MILVUS_FORMAT}
    text = json.dumps({"facts": metadata, "table": table, "folders": index.folders()})
    rows = [
        {"piece": piece, "text": text[start : start + PIECE_BYTES], "none": [0.0, 0.0]}
        for piece, start in enumerate(range(0, len(text), PIECE_BYTES))
    ]
    _create(server, name, "piece", ["text"], [], ("none", 2))  # Milvus requires a vector field
    _insert(server, name, (rows[start : start + BATCH_ROWS] for start in range(0, len(rows), BATCH_ROWS)))


def _write_photos(server, name, index):
    _create(server, name, "row", ["path", "thumbnail"], ["cell"], ("feature", index.metadata["width"]))
    own = np.argsort(index.cells.path_order)  # row in Milvus -> row in the Index
    batches = (_rows(index, start, own[start : start + BATCH_ROWS]) for start in range(0, len(own), BATCH_ROWS))
    _insert(server, name, batches)
    if (count := count_rows(server, name)) != len(own):
        raise InputError(f"{server.address}: stored {count:,} of {len(own):,} photos; see its log, and index again")


def _rows(index, first, own):
    numbers = index.cells.cell_ends.searchsorted(own, side="right").tolist()
    features = index.cells.features[own]
    rows = []
    for place, (row, number) in enumerate(zip(own.tolist(), numbers, strict=True)):
        thumbnail = base64.b64encode(index.thumbnail(row)).decode()
        rows.append({
            "row": first + place, "cell": number, "path": json.dumps(index.path(row)),
            "thumbnail": thumbnail if len(thumbnail) <= MAX_TEXT_BYTES else "", "feature": features[place],
        })  # fmt: skip
    return rows
