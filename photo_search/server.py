"""The drawing page: what it answers, from an index that may be replaced while it is open."""

import asyncio
import errno
import mimetypes
import os
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from photo_search.access import LOOPBACK, AccessMiddleware, content_security_policy, read_body, refusal
from photo_search.clean_sketch import clean_up
from photo_search.encoder import share_cores
from photo_search.index import INDEX_FILE, Folder, readable
from photo_search.photos import MAX_UPLOAD_BYTES, open_photo, read_drawing
from photo_search.search import DEFAULT_CLUSTER_WEIGHT, MATCHINGS, Searcher, check_drawn, open_location, open_searcher
from utils.cli import InputError

MIN_TOKEN_LENGTH = 8
HTML = Path(__file__).with_name("page.html")
# What belongs to the page, in this order, and goes into it: it stays one file under one policy.
STYLES, SCRIPTS = ("page.css",), ("page.js",)
MAX_SHOWN_PHOTOS = 200  # photos that are shown
MAX_PARALLEL_SEARCHES = 2  # at a time
MAX_WAITING_REQUESTS = 32  # requests that wait for one, each with a picture in memory
UPLOAD_TIMEOUT_S = 15  # seconds that a picture may take to come
CHUNK = 1 << 16


class OpenIndex(NamedTuple):
    """An index that is open."""

    stamp: str  # tells it from those before and after
    finder: Searcher
    folders: list[Folder]


class ReloadingIndex:
    """The index at a place, a folder or a photo_search.milvus.Server, as it is now.

    It is opened again once a writer has replaced it, and may be used by several threads. Raises InputError as
    `open_searcher` does.
    """

    def __init__(self, place, checkpoint=None, device=None):
        self.place, self.checkpoint, self.device = place, checkpoint, device
        self.lock = threading.Lock()
        stamp, finder = _stamp(place), open_searcher(place, checkpoint, device)
        self.album = OpenIndex(stamp, finder, finder.index.folders())

    def now(self):
        """The OpenIndex. Raises InputError if what is there now cannot be opened."""
        with self.lock:
            stamp = _stamp(self.place)
            if stamp != self.album.stamp:
                finder = self._opened()
                self.album = OpenIndex(stamp, finder, finder.index.folders())
            return self.album

    def _opened(self):
        index, old = open_location(self.place), self.album.finder
        if any(index.metadata[name] != old.index.metadata[name] for name in ("sha256", "model", "input_size", "width")):
            return open_searcher(self.place, self.checkpoint, self.device)
        return Searcher(index, old.network)


def _stamp(place):
    if not isinstance(place, str | os.PathLike):
        return place.stamp()
    try:
        return f"{os.stat(Path(place) / INDEX_FILE).st_mtime_ns:x}"
    except OSError:
        return "none"  # opening it tells why


class Page:
    """The routes of the page, over a ReloadingIndex. Searches run in threads, MAX_PARALLEL_SEARCHES at a time."""

    def __init__(self, shelf, timeout=UPLOAD_TIMEOUT_S):
        self.shelf, self.timeout = shelf, timeout
        self.html = page_html()
        self.turns, self.waiting = asyncio.Semaphore(MAX_PARALLEL_SEARCHES), 0
        checkpoint = shelf.album.finder.network.metadata["checkpoint"]
        self.threads = ThreadPoolExecutor(
            MAX_PARALLEL_SEARCHES, "search", share_cores, (checkpoint, MAX_PARALLEL_SEARCHES)
        )

    async def home(self, request):
        return HTMLResponse(self.html)

    def about(self, request):
        """What there is to search in."""
        album = self._album()
        index = album.finder.index
        return JSONResponse({
            "index": album.stamp, "photos": len(index), "matchings": MATCHINGS if index.clusters else MATCHINGS[:1],
            "cluster_weight": DEFAULT_CLUSTER_WEIGHT if index.clusters else 0,
            "folders": [
                {"name": folder.name, "depth": folder.depth, "photos": folder.last - folder.first}
                for folder in album.folders
            ],
        })  # fmt: skip

    async def find(self, request):
        """Photos for the picture in the body, for the photo that the query names, or for what is between the two."""
        if self.waiting >= MAX_WAITING_REQUESTS:
            raise HTTPException(503, "too many searches at once; try again")
        self.waiting += 1
        try:
            body = await read_body(request, MAX_UPLOAD_BYTES, self.timeout)
            async with self.turns:
                if await request.is_disconnected():  # whoever draws on wants no answer for an earlier stroke
                    return Response(status_code=400)
                return JSONResponse(await self._in_a_thread(self._found, request.query_params, body))
        finally:
            self.waiting -= 1

    async def photo(self, request):
        """A photo as it is, or converted to JPEG."""
        kind, file, name = await self._in_a_thread(self._opened_photo, request.path_params)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        headers = {
            "Content-Length": str(size),
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name, safe='')}",
        }
        return StreamingResponse(_chunks(file), media_type=kind, headers=headers)

    def thumbnail(self, request):
        """A photo as a small JPEG."""
        index, row = self._named(request.path_params)
        keep = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(index.thumbnail(row), media_type="image/jpeg", headers=keep)

    async def _in_a_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def _found(self, query, body):
        album = self._album(query.get("index"))
        finder, count = album.finder, len(album.finder.index)
        k = _whole(query.get("k", "20"), "k", 1, MAX_SHOWN_PHOTOS)
        matching = query.get("matching") or None
        if matching not in (None, *MATCHINGS):
            raise HTTPException(400, f"matching: it is one of {', '.join(MATCHINGS)}")
        weight = _share(query["weight"], "weight") if query.get("weight") else None
        allowed = None
        if query.get("folder"):
            place = _whole(query["folder"], "folder", 0, len(album.folders) - 1)
            allowed = album.folders[place].rows(finder.index)
        features, left_out = [], None
        if "photo" in query:
            left_out = _whole(query["photo"], "photo", 0, count - 1)
            features.append(finder.index.features_of([left_out])[0])
        if body or not features:
            drawing = read_drawing(body)
            check_drawn(drawing, "drawing")
            as_drawn = _whole(query.get("as_drawn") or "0", "as_drawn", 0, 1) == 1
            features.append(finder.network.features([drawing if as_drawn else clean_up(drawing)])[0])
        features = _between(features)
        matches = finder.find_features(features, k + (left_out is not None), matching, allowed, weight)
        matches = [match for match in matches if match.row != left_out][:k]
        digests = finder.index.digests_of([match.row for match in matches])
        return {
            "index": album.stamp, "matching": finder.matching(matching),
            "cluster_weight": finder.cluster_weight(matching, weight),
            "found": [_as_json(match, digest) for match, digest in zip(matches, digests, strict=True)],
        }  # fmt: skip

    def _opened_photo(self, names):
        index, row = self._named(names)
        try:
            kind, file = open_photo(index, row)
            name = readable(os.path.basename(index.path(row)))
            return kind, file, name if kind == _kind_of(name) else f"{name}.{kind.removeprefix('image/')}"
        except FileNotFoundError:
            raise HTTPException(404, "this photo is no longer there; index again to leave it out") from None
        except InputError as error:
            raise HTTPException(404, f"this photo cannot be shown: {error}") from None

    def _named(self, names):
        """(Index, row) of a photo that a path names."""
        index = self._album(names["index"]).finder.index
        return index, _whole(names["row"], "photo", 0, len(index) - 1, status=404)

    def _album(self, stamp=None):
        """The OpenIndex; if `stamp` is given, that one: photos and folders have other numbers in others."""
        try:
            album = self.shelf.now()
        except InputError as error:
            raise HTTPException(503, str(error)) from None
        if stamp not in (None, album.stamp):
            raise HTTPException(410, "the photos were indexed again; search again")
        return album


def create_app(shelf, port, token=None, timeout=UPLOAD_TIMEOUT_S):
    """The page of a ReloadingIndex as an ASGI application; port, token: see AccessMiddleware; timeout: of an upload."""
    page = Page(shelf, timeout)
    routes = [
        Route("/", page.home), Route("/about", page.about), Route("/find", page.find, methods=["POST"]),
        Route("/thumbnail/{index}/{row}", page.thumbnail), Route("/photo/{index}/{row}", page.photo),
    ]  # fmt: skip
    handlers = {
        HTTPException: lambda request, error: refusal(error.status_code, error.detail, error.headers),
        InputError: lambda request, error: refusal(400, str(error)),
    }
    return AccessMiddleware(
        Starlette(routes=routes, exception_handlers=handlers), port, token, content_security_policy(page.html)
    )


def _whole(text, name, low, high, status=400):
    """A whole number in a request. Raises HTTPException if it is none from low to high."""
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise HTTPException(status, f"{name}: it is a whole number from {low} to {high}")
    return int(text)


def _share(text, name):
    """A number from 0 to 1 in a request. Raises HTTPException if it is none."""
    if not re.fullmatch(r"0|1|0?\.[0-9]{1,6}|[01]\.0{1,6}", text):
        raise HTTPException(400, f"{name}: it is a number from 0 to 1")
    return float(text)


def _between(features):
    """Features (D,) of length 1 halfway between those in a list of one or two."""
    between = sum(features)
    length = np.linalg.norm(between)
    return between / length if len(features) > 1 and length else features[0]


def _kind_of(name):
    """The media type that the ending of a file name stands for, or None."""
    return mimetypes.guess_type(name)[0]


def page_html():
    """The page: page.html with STYLES and SCRIPTS in the elements for them."""
    read = {name: HTML.with_name(name).read_text(encoding="utf-8") for name in (*STYLES, *SCRIPTS)}
    html = HTML.read_text(encoding="utf-8")
    for element, names in (("style", STYLES), ("script", SCRIPTS)):
        html = html.replace(f"<{element}></{element}>", f"<{element}>\n{''.join(map(read.get, names))}</{element}>", 1)
    return html


def _as_json(match, digest=None):
    return {
        "photo": match.row, "name": readable(os.path.basename(match.path)), "path": readable(match.path),
        "score": match.score, "distance": match.distance, "cluster_distance": match.cluster_distance, "digest": digest,
    }  # fmt: skip


def _chunks(file):
    with file:
        while chunk := file.read(CHUNK):
            yield chunk


MAX_CONNECTIONS = 256  # at a time


def serve(place, checkpoint=None, device=None, host="127.0.0.1", port=8000, token=None):
    """Serve the page of the index at a place, see find.open_location, until Ctrl-C, which raises KeyboardInterrupt.

    token: what visitors must show; another machine can only reach the page with one. port 0: one that is free.
    Raises InputError as `open_searcher` does, for a host that is not this machine, and for a port that is in use.
    """
    if host not in LOOPBACK and not token:
        raise InputError(f"--host {host}: others could see your photos there; guard them with --token")
    if token is not None and not re.fullmatch(rf"[A-Za-z0-9_-]{{{MIN_TOKEN_LENGTH},}}", token):
        raise InputError(
            f"--token: shorter ones can be guessed; give at least {MIN_TOKEN_LENGTH} letters, digits, - and _"
        )
    with _listen(host, port) as listener:
        shelf = ReloadingIndex(place, checkpoint, device)
        port = listener.getsockname()[1]
        server = uvicorn.Server(_config(create_app(shelf, port, token)))
        own, index = f"[{host}]" if ":" in host else host, shelf.album.finder.index
        shown = f"/?token={token}" if token else "/"
        print(f"{index.name}: {len(index):,} photos; draw at http://{own}:{port}{shown}", flush=True)
        server.run(sockets=[listener])


def _config(app):
    return uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", http="h11", ws="none",
        limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=2, h11_max_incomplete_event_size=1 << 14,
    )  # fmt: skip


def _listen(host, port):
    """A socket that listens at host and port."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except socket.gaierror as error:
        raise InputError(f"--host {host}: not an address of this machine ({error.strerror})") from None
    except OSError as error:
        why = os.strerror(error.errno)
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(f"--host {host}: not an address of this machine ({why.lower()})") from None
        raise InputError(f"--host {host} --port {port}: {why.lower()}; choose another --port") from None
