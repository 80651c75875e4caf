"""An index of photos in Milvus: a copy of an index on disk that any machine can search.

    NAME                         an alias of the current collection of metadata
    NAME_MARK_VERSION            one row for each photo; MARK identifies the index on disk
    NAME_MARK_VERSION_about      metadata, table of cells and folders: JSON, in pieces

A photo has a key: its rank in the order of paths when the collection was made, or the next number if it came later. A
row with `gone` below the number of removals that a reader knows is not one of its photos. Milvus searches exactly
(FLAT); its L2 is the squared distance. Answers are checked as data. photo_search.milvus_publish writes the collections.
"""

import base64
import functools
import importlib.util
import json
import logging
import os
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import grpc
import numpy as np
from pymilvus import MilvusClient, MilvusException

from photo_search import remote_search
from photo_search.cells import Cells, assign_codes
from photo_search.folders import Folder
from photo_search.milvus_about import int64_in_range, parse_about
from utils.cli import InputError, first_line
from utils.sampling import evenly_spaced

DEFAULT_COLLECTION = "photo_index"
REQUEST_TIMEOUT_S = 10
MAX_RETRIES = 10  # of slow requests, some 20 seconds
BATCH_ROWS = 256  # of one request
SAMPLE_PHOTOS = 16  # their cells are checked when an index is opened
_CONNECTIONS = {  # reconnect at once to a restarted server
    "grpc.use_local_subchannel_pool": 1, "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 500,
}  # fmt: skip
_NOT_FOUND, _NOT_LOADED = 100, 101
PARSE_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError, RecursionError,
    SyntaxError,
)  # fmt: skip
MARK, VERSION, ABOUT = "[0-9a-f]{8}", "[0-9a-f]{16}", "_about"  # in names of collections

for _name in ("pymilvus", "milvus_lite"):  # they log a traceback of every error that they raise
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


class Server:
    """A collection on a Milvus server. Its errors become InputErrors.

    uri: http://HOST:PORT, https://..., or a path that ends in .db, which milvus-lite makes and opens in this process.
    The environment variable MILVUS_TOKEN is sent as the token.
    collection: None for DEFAULT_COLLECTION.
    Raises InputError if the uri is invalid, or Milvus cannot be reached there.
    """

    def __init__(self, uri, collection=None):
        collection = DEFAULT_COLLECTION if collection is None else collection
        _check_names(uri, collection)
        self.uri, self.collection, self.address = uri, collection, f"{collection} at {uri}"
        token = os.environ.get("MILVUS_TOKEN", "")
        self.client = self._call(MilvusClient, uri, token=token, timeout=REQUEST_TIMEOUT_S, grpc_options=_CONNECTIONS)

    @property
    def is_file(self):
        """Whether milvus-lite serves it in this process, on a port of this machine, to whoever asks."""
        return _is_file(self.uri)

    def call(self, method, *arguments, **more):
        """Call a fast method of MilvusClient, with a timeout."""
        return self._call(getattr(self.client, method), *arguments, timeout=REQUEST_TIMEOUT_S, **more)

    def call_with_retries(self, method, *arguments, **more):
        """Call a slow method of MilvusClient, without a timeout."""
        return self._call(getattr(self.client, method), *arguments, retry_times=MAX_RETRIES, **more)

    def _call(self, function, *arguments, **more):
        try:
            try:
                return function(*arguments, **more)
            except MilvusException as error:
                if error.code != _NOT_LOADED:
                    raise
                self.client.load_collection(arguments[0], retry_times=MAX_RETRIES)  # the server was restarted
                return function(*arguments, **more)
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            if getattr(error, "code", None) == _NOT_FOUND:
                raise InputError(f"{self.address}: the photos were indexed again, or removed; search again") from error
            wayout = "another process may have it open" if _is_file(self.uri) else "see whether Milvus runs there"
            raise InputError(f"{self.address}: {_reason(error)}; {wayout}, or correct --uri") from error

    def current(self):
        """The name of the collection that the alias leads to; None if there is none.

        Raises InputError if the collection was not created by search_photos.py.
        """
        if not self.call("has_collection", self.collection):
            return None
        if self.collection not in self.call("list_collections"):
            name = self.call("describe_alias", self.collection)["collection_name"]
            if re.fullmatch(rf"{self.collection}_{MARK}_{VERSION}({ABOUT})?", name):
                return name
        raise InputError(f"{self.address}: was not created by search_photos.py; name another --collection")

    def version(self):
        """The hash of the current state."""
        return self.call("describe_alias", self.collection)["collection_name"].removesuffix(ABOUT).rsplit("_", 1)[-1]

    def open(self):
        """The MilvusIndex in this collection. Raises InputError if there is none, or it is damaged."""
        name = self.current()
        if name is None:
            raise InputError(
                f"{self.address}: no index of photos; make one with search_photos.py index, or set --collection"
            )
        with _damage_as_input_error(self):
            index = MilvusIndex(self, *parse_about(read_about(self, name), name.removesuffix(ABOUT)))
            _check_photos(index)
        return index


def existing_server(uri, collection=None):
    """The Server of an existing index; does not create a file. Raises InputError."""
    if _is_file(uri) and not Path(uri).exists():
        raise InputError(f"--uri {uri}: no such file; make it with search_photos.py index, or correct --uri")
    return Server(uri, collection)


def open_milvus(uri, collection=None):
    """The MilvusIndex in a collection. Raises InputError as Server and Server.open do."""
    return existing_server(uri, collection).open()


def _check_names(uri, collection):
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", collection):
        raise InputError(f"--collection {collection}: use letters, digits and _, and begin with a letter")
    if "@" in uri:
        raise InputError("--uri: holds a name or password; put them into the environment variable MILVUS_TOKEN")
    if _is_file(uri):
        if not Path(uri).parent.is_dir():
            raise InputError(f"--uri {uri}: its folder does not exist; make it, or correct --uri")
        if importlib.util.find_spec("milvus_lite") is None:
            raise InputError(f"--uri {uri}: a file needs milvus-lite; pip install -r requirements-milvus.txt")
        return
    try:
        fits = re.fullmatch(r"https?://[^\s/]+(/\S*)?", uri) and urlparse(uri).hostname and urlparse(uri).port != 0
    except ValueError:  # an invalid port
        fits = False
    if not fits:
        raise InputError(f"--uri {uri}: is not an address; give http://HOST:PORT, or a path that ends in .db")


def _is_file(uri):
    return "://" not in uri and uri.endswith(".db")


def _reason(error):
    text = str(getattr(error, "message", "")) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]


@dataclass(frozen=True)
class MilvusIndex:
    """A snapshot of an index in Milvus, with the methods of index.Index. Safe to use from several threads."""

    server: Server
    generation: str  # name of its collection of photos
    metadata: dict  # as in photo_search.index.Index
    cells: Cells  # only the arrays of cells
    stored_folders: list[Folder]
    keys: np.ndarray  # (N,) of the photos in the order of their paths
    sorted_keys: int  # keys below are in the order of paths
    visible: str  # filter of the photos of this snapshot

    def __len__(self):
        return len(self.keys)

    @functools.cached_property
    def rows(self):
        """The row of each key; -1 for removed photos."""
        rows = np.full(int(self.cells.cell_ends[-1]), -1)
        rows[self.keys] = np.arange(len(self.keys))
        return rows

    @property
    def name(self):
        """The name in messages."""
        return self.server.address

    @property
    def clusters(self):
        """(M, K) of its codebook, or None without one."""
        return self.cells.codebook.shape[:2] if len(self.cells.codebook) else None

    def nearest(self, features, k, weight, allowed=None):
        """See photo_search.cells.find_nearest. allowed: a range of rows; None for all. Raises InputError."""
        ask = functools.partial(self._ask, features, allowed)
        count = len(self if allowed is None else allowed)
        with _damage_as_input_error(self.server):
            return remote_search.find_nearest_remote(self.cells, features, k, ask, self._fetch, weight, count)

    def paths_of(self, rows):
        """The absolute paths of photos (n,): [str, ...]."""
        with _damage_as_input_error(self.server):
            return [_path(text) for text in self._columns(rows, "path")]

    def path(self, row):
        """The absolute path of a photo."""
        return self.paths_of([row])[0]

    def thumbnails_of(self, rows):
        """Photos as small JPEGs: [bytes, ...]; b"" for a photo without one."""
        with _damage_as_input_error(self.server):
            return [base64.b64decode(text) for text in self._columns(rows, "thumbnail")]

    def thumbnail(self, row):
        """A photo as a small JPEG (bytes)."""
        return self.thumbnails_of([row])[0]

    def digests_of(self, rows):
        """As Index.digests_of; [None, ...], since Milvus has no digests."""
        return [None for _ in rows]

    def features_of(self, rows):
        """Features (n, D) float32 of rows (n,)."""
        with _damage_as_input_error(self.server):
            return self._fetch(np.asarray(rows))[0]

    def between(self, first, last):
        """The photos from first to last − 1 in the order of their paths, for `allowed` of `nearest`."""
        return range(first, last)

    def folders(self):
        """The Folders that a search can be limited to."""
        return self.stored_folders

    def _ask(self, features, allowed, requests):
        """Answers to the requests of photo_search.remote_search."""
        among = self.visible if allowed is None else _and(self.visible, self._filter(allowed))
        return list(_threads().map(lambda request: self._answer(features, among, *request), requests))

    def _filter(self, allowed):
        """The filter for a range of rows."""
        keys = self.keys[allowed.start : allowed.stop]
        ranks, later = keys[keys < self.sorted_keys], keys[keys >= self.sorted_keys]
        first, last = (ranks[0], ranks[-1]) if len(ranks) else (0, -1)
        return f"((row >= {first} and row <= {last}) or row in [{','.join(map(str, later.tolist()))}])"

    def _answer(self, features, among, chosen, limit):
        cells = "" if chosen is None else f"cell in [{','.join(map(str, chosen.tolist()))}]"
        hits = self.server.call(
            "search", self.generation, [features.tolist()], anns_field="feature", limit=limit, output_fields=["cell"],
            filter=_and(cells, among), search_params={"metric_type": "L2"},
        )[0]  # fmt: skip
        keys = int64_in_range([hit["row"] for hit in hits], len(self.rows))
        rows = None if keys is None else self.rows[keys]
        numbers = int64_in_range([hit["entity"]["cell"] for hit in hits], len(self.cells.cell_ends))
        squares = np.array([hit["distance"] for hit in hits], np.float64)
        is_valid = (
            rows is not None and (rows >= 0).all() and numbers is not None
            and len(rows) <= limit and len(np.unique(rows)) == len(rows)
            and (chosen is None or np.isin(numbers, chosen).all())
            and np.isfinite(squares).all() and (np.diff(squares) >= 0).all()
        )  # fmt: skip
        if not is_valid:
            raise ValueError("unexpected search result")
        return rows, numbers, squares.astype(np.float32)

    def _fetch(self, rows):
        features, numbers = self._columns(rows, "feature", "cell")
        numbers = int64_in_range(numbers, len(self.cells.cell_ends))
        features = np.array(features, np.float32).reshape(len(rows), self.metadata["width"])
        if numbers is None or not (np.abs(np.linalg.norm(features, axis=1) - 1) < 0.01).all():
            raise ValueError("features are not of length 1, or in no cell")
        return features, numbers

    def _columns(self, rows, *fields):
        """The values of fields for rows (n,): a list for each field, or one list for one field."""
        found, keys = {}, self.keys[np.asarray(rows, np.int64)].tolist()
        for start in range(0, len(keys), BATCH_ROWS):
            wanted = ",".join(map(str, keys[start : start + BATCH_ROWS]))
            answer = self.server.call(
                "query", self.generation, filter=f"row in [{wanted}]", output_fields=["row", *fields], limit=BATCH_ROWS
            )
            found |= {each["row"]: each for each in answer}
        if not found.keys() >= set(keys):
            raise ValueError("photos are missing")
        columns = [[found[key][field] for key in keys] for field in fields]
        return columns if len(columns) > 1 else columns[0]


def _and(*filters):
    return " and ".join(filter(None, filters))


def _path(text):
    path = json.loads(text)
    os.fsencode(path)
    if not os.path.isabs(path):
        raise ValueError("a stored path is not absolute")
    return path


@contextmanager
def _damage_as_input_error(server):
    """Within this block, which reads from a server, parse errors become InputErrors."""
    try:
        yield
    except InputError:
        raise
    except PARSE_ERRORS as error:
        why = first_line(error, 100)
        raise InputError(f"{server.address}: damaged index ({why}); index into another --collection") from error


@functools.cache
def _threads():
    return ThreadPoolExecutor(remote_search.REQUESTS_PER_ROUND, "milvus")


def read_about(server, name):
    """The JSON text of the collection that an alias leads to: metadata, table of cells and folders."""
    name = name if name.endswith(ABOUT) else name + ABOUT
    pieces, count = {}, count_rows(server, name)
    for start in range(0, count, BATCH_ROWS):
        limits = f"piece >= {start} and piece < {start + BATCH_ROWS}"
        answer = server.call("query", name, filter=limits, output_fields=["piece", "text"], limit=BATCH_ROWS)
        pieces |= {each["piece"]: each["text"] for each in answer}
    return "".join(pieces.get(piece, "") for piece in range(count))


def _check_photos(index):
    """Raise ValueError unless the collection of photos fits the metadata and the cells."""
    server, width = index.server, index.metadata["width"]
    fields = {field["name"]: field for field in server.call("describe_collection", index.generation)["fields"]}
    if not fields.keys() >= {"row", "cell", "path", "thumbnail", "feature", *(["gone"] if index.visible else [])}:
        raise ValueError("its fields are not those of photos")
    dimension = fields["feature"]["params"].get("dim")
    if dimension != width:
        raise ValueError(f"features of {dimension} values, not {width}")
    kind = server.call("describe_index", index.generation, "feature")
    if (kind["index_type"], kind["metric_type"]) != ("FLAT", "L2"):
        raise ValueError("its search is not exact; it must be FLAT with L2")
    server.call_with_retries("load_collection", index.generation)
    if (count := count_rows(server, index.generation, index.visible)) != len(index):
        raise ValueError(f"{count:,} photos, not {len(index):,}")
    features, numbers = index._fetch(evenly_spaced(len(index), SAMPLE_PHOTOS))
    if (assign_codes(features, index.cells.codebook) != index.cells.codes[numbers]).any():
        raise ValueError("photos are not in the cells of their codes")
    # A first search alone: milvus-lite's server imports libraries in it, which fails in several threads at once.
    index._answer(features[0], index.visible, numbers[:1], 1)


def count_rows(server, name, among=""):
    """How many rows of a collection fit a filter."""
    return int(server.call("query", name, filter=among, output_fields=["count(*)"])[0]["count(*)"])
