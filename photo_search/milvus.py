"""The index of photos in Milvus: a copy of one on disk, which any machine can search.

    NAME                         an alias, which tells the generation that is current
    NAME_MARK_GENERATION         a photo a row; MARK tells which index on disk it is a copy of
    NAME_MARK_GENERATION_about   what the index knows of itself: JSON, cut into pieces

Rows are numbered in the order of their paths. Milvus searches them without approximation (FLAT); its L2 is the
squared distance. What comes from it is data, and is checked. photo_search.publish writes it.
"""

import base64
import functools
import importlib.util
import io
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

from photo_search import rounds
from photo_search.cells import CLUSTER_WEIGHT, Cells, assign_codes
from photo_search.index import INDEX_METADATA, Folder, cells_field, check_table, has_fields
from utils.cli import InputError
from utils.sampling import evenly_spaced

DEFAULT_COLLECTION, MILVUS_FORMAT = "photo_index", 1
REQUEST_TIMEOUT_S = 10  # seconds that a server may take to answer
MAX_RETRIES = 10  # times that what takes long is tried, some 20 seconds
BATCH_ROWS = 256  # photos that travel at a time
SAMPLE_PHOTOS = 16  # photos whose cells are checked
CELL_ARRAYS = ("codebook", "codes", "ends", "centres", "radii", "basis")  # what belongs to cells, of Cells
_CONNECTIONS = {  # a server that has been started again is found at once
    "grpc.use_local_subchannel_pool": 1, "grpc.initial_reconnect_backoff_ms": 100, "grpc.max_reconnect_backoff_ms": 500,
}  # fmt: skip
_NOT_FOUND, _NOT_LOADED = 100, 101
_PARSE_ERRORS = (
    ValueError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, MemoryError, RecursionError,
    SyntaxError,
)  # fmt: skip
MARK, GENERATION = "[0-9a-f]{8}", "[0-9a-f]{16}"  # in names of collections

for _name in ("pymilvus", "milvus_lite"):  # they tell of every error with a traceback, and raise it, too
    logging.getLogger(_name).setLevel(logging.CRITICAL + 1)


class Server:
    """Milvus at `uri`, and in it `collection`. What fails there becomes an InputError.

    uri: http://HOST:PORT, https://..., or a path that ends in .db, which milvus-lite makes and opens in this process.
    The environment variable MILVUS_TOKEN is shown to servers that want one.
    collection: None for DEFAULT_COLLECTION.
    Raises InputError if it is none, or Milvus cannot be reached there.
    """

    def __init__(self, uri, collection=None):
        collection = DEFAULT_COLLECTION if collection is None else collection
        _check_names(uri, collection)
        self.uri, self.collection, self.address = uri, collection, f"{collection} at {uri}"
        token = os.environ.get("MILVUS_TOKEN", "")
        self.client = self._call(MilvusClient, uri, token=token, timeout=REQUEST_TIMEOUT_S, grpc_options=_CONNECTIONS)

    def call(self, method, *arguments, **more):
        """A method of MilvusClient that answers at once."""
        return self._call(getattr(self.client, method), *arguments, timeout=REQUEST_TIMEOUT_S, **more)

    def call_with_retries(self, method, *arguments, **more):
        """A method of MilvusClient that takes as long as it takes."""
        return self._call(getattr(self.client, method), *arguments, retry_times=MAX_RETRIES, **more)

    def _call(self, function, *arguments, **more):
        try:
            try:
                return function(*arguments, **more)
            except MilvusException as error:
                if error.code != _NOT_LOADED:
                    raise
                self.client.load_collection(arguments[0], retry_times=MAX_RETRIES)  # the server has been started again
                return function(*arguments, **more)
        except (MilvusException, grpc.RpcError, grpc.FutureTimeoutError) as error:
            if getattr(error, "code", None) == _NOT_FOUND:
                raise InputError(f"{self.address}: the photos were indexed again, or removed; search again") from error
            wayout = "another process may have it open" if _is_file(self.uri) else "see whether Milvus runs there"
            raise InputError(f"{self.address}: {_reason(error)}; {wayout}, or correct --uri") from error

    def current(self):
        """The name of the current generation; None if there is none.

        Raises InputError if what is there is not an index of photos.
        """
        if not self.call("has_collection", self.collection):
            return None
        if self.collection not in self.call("list_collections"):
            name = self.call("describe_alias", self.collection)["collection_name"]
            if re.fullmatch(rf"{self.collection}_{MARK}_{GENERATION}", name):
                return name
        raise InputError(f"{self.address}: holds something else than photos of this program; name another --collection")

    def stamp(self):
        """What tells the generation that is current from others."""
        return self.call("describe_alias", self.collection)["collection_name"].rsplit("_", 1)[-1]

    def open(self):
        """The MilvusIndex there. Raises InputError if there is none, or it is not as a writer left it."""
        name = self.current()
        if name is None:
            raise InputError(
                f"{self.address}: no index of photos; make one with search_photos.py index, or set --collection"
            )
        with _as_data(self):
            index = MilvusIndex(self, name, *_parsed(_read_about(self, f"{name}_about")))
            _check_photos(index)
        return index


def existing_server(uri, collection=None):
    """The Server that is to hold an index already: a file is not made. Raises InputError."""
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
            raise InputError(f"--uri {uri}: its folder is not there; make it, or correct --uri")
        if importlib.util.find_spec("milvus_lite") is None:
            raise InputError(f"--uri {uri}: a file needs milvus-lite; pip install -r requirements-milvus.txt")
        return
    try:
        fits = re.fullmatch(r"https?://[^\s/]+(/\S*)?", uri) and urlparse(uri).hostname and urlparse(uri).port != 0
    except ValueError:  # a port that is none
        fits = False
    if not fits:
        raise InputError(f"--uri {uri}: is no address; give http://HOST:PORT, or a path that ends in .db")


def _is_file(uri):
    return "://" not in uri and uri.endswith(".db")


def _reason(error):
    text = str(getattr(error, "message", "")) or str(error) or type(error).__name__
    return text.strip().splitlines()[0][:200]


@dataclass(frozen=True)
class MilvusIndex:
    """An index in Milvus as it was when it was opened. It may be used by several threads."""

    server: Server
    generation: str  # name of its collection
    metadata: dict  # as those of photo_search.index.Index
    cells: Cells  # what belongs to cells; it holds no photos
    shown: list[Folder]

    def __len__(self):
        return int(self.cells.cell_ends[-1])

    @property
    def name(self):
        """How messages call it."""
        return self.server.address

    @property
    def clusters(self):
        """(M, K) of its codebook, or None without one."""
        return self.cells.codebook.shape[:2] if len(self.cells.codebook) else None

    def nearest(self, features, k, weight=CLUSTER_WEIGHT, allowed=None):
        """As photo_search.cells.search. allowed: a range of rows; None for all. Raises InputError."""
        ask = functools.partial(self._ask, features, allowed)
        count = len(allowed) if allowed is not None else None
        with _as_data(self.server):
            return rounds.search(self.cells, features, k, ask, self._fetch, weight, count)

    def paths_of(self, rows):
        """The absolute paths of photos (n,): [str, ...]."""
        with _as_data(self.server):
            return [_path(text) for text in self._columns(rows, "path")]

    def path(self, row):
        """The absolute path of a photo."""
        return self.paths_of([row])[0]

    def thumbnails_of(self, rows):
        """Photos as small JPEGs: [bytes, ...]; empty ones where there is none."""
        with _as_data(self.server):
            return [base64.b64decode(text) for text in self._columns(rows, "thumbnail")]

    def thumbnail(self, row):
        """A photo as a small JPEG (bytes)."""
        return self.thumbnails_of([row])[0]

    def digests_of(self, rows):
        """As Index.digests_of; None each, since Milvus holds no digests."""
        return [None for _ in rows]

    def features_of(self, rows):
        """Features (n, D) float32 of rows (n,)."""
        with _as_data(self.server):
            return self._fetch(np.asarray(rows))[0]

    def between(self, first, last):
        """The photos from first to last − 1 in the order of their paths, as `nearest` has them allowed."""
        return range(first, last)

    def folders(self):
        """The Folders that a search can be kept to."""
        return self.shown

    def _ask(self, features, allowed, questions):
        """Answers to the questions of photo_search.rounds."""
        among = "" if allowed is None else f"row >= {allowed.start} and row < {allowed.stop}"
        return list(_threads().map(lambda question: self._answer(features, among, *question), questions))

    def _answer(self, features, among, chosen, limit):
        cells = "" if chosen is None else f"cell in [{','.join(map(str, chosen.tolist()))}]"
        hits = self.server.call(
            "search", self.generation, [features.tolist()], anns_field="feature", limit=limit, output_fields=["cell"],
            filter=" and ".join(filter(None, (cells, among))), search_params={"metric_type": "L2"},
        )[0]  # fmt: skip
        rows = _integers([hit["row"] for hit in hits], len(self))
        numbers = _integers([hit["entity"]["cell"] for hit in hits], len(self.cells.cell_ends))
        squares = np.array([hit["distance"] for hit in hits], np.float64)
        sound = (
            rows is not None and numbers is not None and len(rows) <= limit and len(np.unique(rows)) == len(rows)
            and (chosen is None or np.isin(numbers, chosen).all())
            and np.isfinite(squares).all() and (np.diff(squares) >= 0).all()
        )  # fmt: skip
        if not sound:
            raise ValueError("it finds what was not asked for")
        return rows, numbers, squares.astype(np.float32)

    def _fetch(self, rows):
        features, numbers = self._columns(rows, "feature", "cell")
        numbers = _integers(numbers, len(self.cells.cell_ends))
        features = np.array(features, np.float32).reshape(len(rows), self.metadata["width"])
        if numbers is None or not (np.abs(np.linalg.norm(features, axis=1) - 1) < 0.01).all():
            raise ValueError("features are not of length 1, or in no cell")
        return features, numbers

    def _columns(self, rows, *fields):
        """The values of fields for rows (n,): a list for each field; one list where it is one."""
        found = {}
        for start in range(0, len(rows), BATCH_ROWS):
            wanted = ",".join(str(int(row)) for row in rows[start : start + BATCH_ROWS])
            answer = self.server.call(
                "query", self.generation, filter=f"row in [{wanted}]", output_fields=["row", *fields], limit=BATCH_ROWS
            )
            found |= {each["row"]: each for each in answer}
        if not found.keys() >= {int(row) for row in rows}:
            raise ValueError("photos are missing")
        columns = [[found[int(row)][field] for row in rows] for field in fields]
        return columns if len(columns) > 1 else columns[0]


def _path(text):
    path = json.loads(text)
    os.fsencode(path)
    if not os.path.isabs(path):
        raise ValueError("paths are none")
    return path


@contextmanager
def _as_data(server):
    """Within this block, which reads what a server holds, an error becomes an InputError."""
    try:
        yield
    except InputError:
        raise
    except _PARSE_ERRORS as error:
        why = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise InputError(f"{server.address}: damaged index ({why}); index into another --collection") from error


def _integers(values, end):
    """`values` as (n,) int64 if all are whole numbers from 0 to end − 1; else None."""
    if not all(type(value) is int and 0 <= value < end for value in values):
        return None
    return np.array(values, np.int64)


@functools.cache
def _threads():
    return ThreadPoolExecutor(rounds.REQUESTS_PER_ROUND, "milvus")


def _read_about(server, name):
    """The text in which a generation tells of itself."""
    pieces, count = {}, count_rows(server, name)
    for start in range(0, count, BATCH_ROWS):
        limits = f"piece >= {start} and piece < {start + BATCH_ROWS}"
        answer = server.call("query", name, filter=limits, output_fields=["piece", "text"], limit=BATCH_ROWS)
        pieces |= {each["piece"]: each["text"] for each in answer}
    return "".join(pieces.get(piece, "") for piece in range(count))


def _parsed(text):
    """(metadata, Cells, Folders) of such a text, checked. Raises ValueError, or other errors of _PARSE_ERRORS."""
    content = json.loads(text)
    metadata, texts = content["facts"], content["table"]
    if not has_fields(metadata, {**INDEX_METADATA, "format": int}) or metadata["format"] != MILVUS_FORMAT:
        raise ValueError("it was made by another version of this program")
    table = {part: np.load(io.BytesIO(base64.b64decode(texts[part])), allow_pickle=False) for part in CELL_ARRAYS}
    fields = {cells_field(name): array for name, array in table.items()}
    cells = Cells(**fields, features=_none(2), pca_projection=_none(2), path_order=_none(1))
    check_table(cells, metadata["width"])
    if np.diff(cells.cell_ends, prepend=0).max() > rounds.MAX_PHOTOS_PER_REQUEST:
        raise ValueError("its cells are too large")
    folders = [Folder(*values) for values in content["folders"]]
    for name, depth, first, last in folders:
        if not (
            type(name) is str and depth in (0, 1) and _integers([first, last], cells.cell_ends[-1] + 1) is not None
        ):
            raise ValueError("its folders are none")
        if first >= last:
            raise ValueError("its folders are empty")
    return metadata, cells, folders


def _none(dimensions):
    return np.empty((0,) * dimensions, np.float32)


def _check_photos(index):
    """Raise ValueError unless the collection of photos is the one that the rest speaks of."""
    server, width = index.server, index.metadata["width"]
    fields = {field["name"]: field for field in server.call("describe_collection", index.generation)["fields"]}
    if not fields.keys() >= {"row", "cell", "path", "thumbnail", "feature"}:
        raise ValueError("it holds other fields")
    dimension = fields["feature"]["params"].get("dim")
    if dimension != width:
        raise ValueError(f"features of {dimension} values, where {width} are told of")
    kind = server.call("describe_index", index.generation, "feature")
    if (kind["index_type"], kind["metric_type"]) != ("FLAT", "L2"):
        raise ValueError("its search is not exact; it must be FLAT with L2")
    server.call_with_retries("load_collection", index.generation)
    if (count := count_rows(server, index.generation)) != len(index):
        raise ValueError(f"{count:,} photos, not {len(index):,}")
    features, numbers = index._fetch(evenly_spaced(len(index), SAMPLE_PHOTOS))
    if (assign_codes(features, index.cells.codebook) != index.cells.codes[numbers]).any():
        raise ValueError("its photos are in the cells of another codebook")


def count_rows(server, name):
    """How many rows a collection has."""
    return int(server.call("query", name, filter="", output_fields=["count(*)"])[0]["count(*)"])
