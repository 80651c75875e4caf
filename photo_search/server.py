"""The web server of the drawing page: searches, thumbnails and photos of an index that may be replaced meanwhile."""

import asyncio
import mimetypes
import os
import re
import sys
import threading
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from photo_search.access import (
    AUTO,
    LOOPBACK,
    AccessMiddleware,
    BrokenResponse,
    choose_token,
    content_security_policy,
    read_body,
    refusal,
)
from photo_search.clean_sketch import clean_up
from photo_search.encoder import share_cores
from photo_search.file_manager import has_desktop, show_in_folder
from photo_search.folders import Folder, readable
from photo_search.http_server import OUT_OF_FILES, PageServer, listen, page_config
from photo_search.index import INDEX_FILE, is_index
from photo_search.partial_index import first_run_progress
from photo_search.photos import MAX_UPLOAD_BYTES, open_photo, read_drawing
from photo_search.search import DEFAULT_CLUSTER_WEIGHT, MATCHINGS, Searcher, check_drawn, open_index_at, open_searcher
from photo_search.watch import Watcher
from utils.cli import InputError, sigterm_as_exception

HTML = Path(__file__).with_name("page.html")
# Inlined into the page in this order, so that it is one file with one Content-Security-Policy.
STYLES, SCRIPTS = ("page.css",), ("page_paper.js", "page_state.js", "page_photos.js", "page.js")
MAX_SHOWN_PHOTOS = 200
MAX_PARALLEL_SEARCHES = 2
MAX_WAITING_REQUESTS = 32  # each with a picture in memory
UPLOAD_TIMEOUT_S = 15
CHUNK = 1 << 16


class FirstRunError(InputError):
    """The photos of an index are still being computed."""

    def __init__(self, location, done, total):
        so_far = f"{done:,} of {total:,}" if done < total else f"all {total:,} are read, and are being grouped"
        super().__init__(f"{location}: the photos are being indexed, {so_far}")


class OpenIndex(NamedTuple):
    """A version of the index."""

    version: str  # differs between versions
    searcher: Searcher
    folders: list[Folder]


class ReloadingIndex:
    """The index at a location, a folder or a photo_search.milvus.Server; reopened after a writer has replaced it.

    Safe to use from several threads. Raises InputError as `open_searcher` does, but not while the first run that makes
    the index is unfinished.
    """

    def __init__(self, location, checkpoint=None, device=None):
        self.location, self.checkpoint, self.device = location, checkpoint, device
        self.lock, self.opened = threading.Lock(), None
        with suppress(FirstRunError):
            self.latest()

    def latest(self):
        """The latest OpenIndex. Raises InputError if it cannot be opened, FirstRunError if there is none yet."""
        with self.lock:
            version = _version_at(self.location)
            if self.opened is None or version != self.opened.version:
                searcher = self._reopen()
                self.opened = OpenIndex(version, searcher, searcher.index.folders())
            return self.opened

    def _reopen(self):
        if self.opened is None:
            is_local = isinstance(self.location, str | os.PathLike)
            if is_local and not is_index(self.location) and (progress := first_run_progress(Path(self.location))):
                raise FirstRunError(self.location, *progress)
            return open_searcher(self.location, self.checkpoint, self.device)
        index, old = open_index_at(self.location), self.opened.searcher
        if any(index.metadata[name] != old.index.metadata[name] for name in ("sha256", "model", "input_size", "width")):
            return open_searcher(self.location, self.checkpoint, self.device)
        return Searcher(index, old.encoder)


def _version_at(location):
    if not isinstance(location, str | os.PathLike):
        return location.version()
    try:
        return f"{os.stat(Path(location) / INDEX_FILE).st_mtime_ns:x}"
    except OSError:
        return "none"  # opening it raises the error


class Page:
    """The routes of the page, over a ReloadingIndex. Searches run in threads, MAX_PARALLEL_SEARCHES at a time."""

    def __init__(self, reloading, timeout=UPLOAD_TIMEOUT_S, show=None):
        self.reloading, self.timeout, self.show_file = reloading, timeout, show
        self.html = page_html()
        self.turns, self.waiting = asyncio.Semaphore(MAX_PARALLEL_SEARCHES), 0
        self.threads = ThreadPoolExecutor(MAX_PARALLEL_SEARCHES, "search", self._share_cores)

    def _share_cores(self):
        if opened := self.reloading.opened:
            share_cores(opened.searcher.encoder.metadata["checkpoint"], MAX_PARALLEL_SEARCHES)

    async def home(self, request):
        return HTMLResponse(self.html)

    def health(self, request):
        """200 if the index can be opened, else 503; needs no token, and says nothing of the index."""
        try:
            self._opened_index()
        except HTTPException:
            raise HTTPException(503, "the index cannot be opened") from None
        return JSONResponse({"status": "ok"})

    def about(self, request):
        """Number of photos, matchings and folders of the index."""
        opened = self._opened_index()
        index = opened.searcher.index
        return JSONResponse({
            "index": opened.version, "photos": len(index), "matchings": MATCHINGS if index.clusters else MATCHINGS[:1],
            "cluster_weight": DEFAULT_CLUSTER_WEIGHT if index.clusters else 0, "show": self.show_file is not None,
            "folders": [
                {"name": folder.name, "depth": folder.depth, "photos": folder.last - folder.first}
                for folder in opened.folders
            ],
        })  # fmt: skip

    async def find(self, request):
        """Search with the picture in the body, with the photo of the query string, or with the mean of both."""
        if self.waiting >= MAX_WAITING_REQUESTS:
            raise HTTPException(503, "too many searches at once; try again")
        self.waiting += 1
        try:
            body = await read_body(request, MAX_UPLOAD_BYTES, self.timeout)
            async with self.turns:
                if await request.is_disconnected():  # the page aborts a search when the drawing changes
                    return Response(status_code=400)
                return JSONResponse(await self._run_in_thread(self._search, request.query_params, body))
        finally:
            self.waiting -= 1

    async def photo(self, request):
        """A photo: the file, or converted to JPEG."""
        kind, file, name = await self._run_in_thread(self._open_photo, request.path_params)
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        headers = {
            "Content-Length": str(size),
            "Content-Disposition": f"inline; filename*=UTF-8''{quote(name, safe='')}",
        }
        return StreamingResponse(_chunks(file, size), media_type=kind, headers=headers)

    def thumbnail(self, request):
        """A photo as a small JPEG."""
        index, row = self._index_and_row(request.path_params)
        keep = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(index.thumbnail(row), media_type="image/jpeg", headers=keep)

    def show(self, request):
        """Show a photo in the file manager of this machine."""
        index, row = self._index_and_row(request.path_params)
        path = index.path(row)
        if not os.path.isfile(path):
            raise _missing_photo()
        if not self.show_file(path):
            raise HTTPException(501, "no file manager can be started here")
        return Response(status_code=204)

    async def _run_in_thread(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self.threads, function, *arguments)

    def _search(self, query, body):
        opened = self._opened_index(query.get("index"))
        searcher, count = opened.searcher, len(opened.searcher.index)
        k = _integer(query.get("k", "20"), "k", 1, MAX_SHOWN_PHOTOS)
        matching = query.get("matching") or None
        if matching not in (None, *MATCHINGS):
            raise HTTPException(400, f"matching: it is one of {', '.join(MATCHINGS)}")
        weight = _fraction(query["weight"], "weight") if query.get("weight") else None
        allowed = None
        if query.get("folder"):
            location = _integer(query["folder"], "folder", 0, len(opened.folders) - 1)
            allowed = opened.folders[location].rows(searcher.index)
        features, left_out = [], None
        if "photo" in query:
            left_out = _integer(query["photo"], "photo", 0, count - 1)
            features.append(searcher.index.features_of([left_out])[0])
        if body or not features:
            drawing = read_drawing(body)
            check_drawn(drawing, "drawing")
            as_drawn = _integer(query.get("as_drawn") or "0", "as_drawn", 0, 1) == 1
            features.append(searcher.encoder.features([drawing if as_drawn else clean_up(drawing)])[0])
        features = _mean_direction(features)
        present, missing = searcher.find_present(features, k + 1, matching, allowed, weight, left_out)
        hits = [each for hit in present[:k] for each in (hit, *hit.copies)]
        digests = searcher.index.digests_of([hit.row for hit in hits])
        path = searcher.index.path(left_out) if left_out is not None else ""
        return {
            "index": opened.version, "photo": {"name": readable(os.path.basename(path)), "path": readable(path)},
            "matching": searcher.matching(matching),
            "cluster_weight": searcher.cluster_weight(matching, weight),
            "found": [_as_json(hit, digest) for hit, digest in zip(hits, digests, strict=True)],
            "all": len(present) <= k, "missing": len(missing),
        }  # fmt: skip

    def _open_photo(self, names):
        index, row = self._index_and_row(names)
        try:
            kind, file = open_photo(index, row)
            name = readable(os.path.basename(index.path(row)))
            return kind, file, name if kind == _kind_of(name) else f"{name}.{kind.removeprefix('image/')}"
        except FileNotFoundError as error:
            _refuse_without_files(error)
            raise _missing_photo() from None
        except InputError as error:
            raise HTTPException(404, f"this photo cannot be shown: {error}") from None

    def _index_and_row(self, names):
        """(Index, row) of the photo in the path of a request."""
        index = self._opened_index(names["index"]).searcher.index
        return index, _integer(names["row"], "photo", 0, len(index) - 1, status=404)

    def _opened_index(self, version=None):
        """The latest OpenIndex. Raises HTTPException if its version, and with it all row numbers, is another one."""
        try:
            opened = self.reloading.latest()
        except FirstRunError as error:
            raise HTTPException(503, str(error), {"Retry-After": "2"}) from None
        except InputError as error:
            _refuse_without_files(error)
            raise HTTPException(503, str(error)) from None
        if version not in (None, opened.version):
            raise HTTPException(410, "the photos were indexed again; search again")
        return opened


def create_app(reloading, port, token=None, timeout=UPLOAD_TIMEOUT_S, show=None):
    """The page of a ReloadingIndex as an ASGI application.

    port, token: see AccessMiddleware; timeout: of an upload; show: a function that shows the file at a path in a file
    manager and returns whether that worked, None if clients may not ask for it.
    """
    page = Page(reloading, timeout, show)
    routes = [
        Route("/", page.home), Route("/about", page.about), Route("/health", page.health),
        Route("/find", page.find, methods=["POST"]),
        Route("/thumbnail/{index}/{row}", page.thumbnail), Route("/photo/{index}/{row}", page.photo),
    ]  # fmt: skip
    if show:
        routes.append(Route("/show/{index}/{row}", page.show, methods=["POST"]))
    handlers = {
        HTTPException: lambda request, error: refusal(error.status_code, error.detail, error.headers),
        InputError: lambda request, error: refusal(400, str(error)),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # its redirects are absolute, with the Host of the request
    return AccessMiddleware(app, port, token, content_security_policy(page.html))


def _integer(text, name, low, high, status=400):
    """Parse an integer of a request. Raises HTTPException unless it is from low to high."""
    if not re.fullmatch("[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise HTTPException(status, f"{name}: it is a whole number from {low} to {high}")
    return int(text)


def _fraction(text, name):
    """Parse a number of a request. Raises HTTPException unless it is from 0 to 1."""
    if not re.fullmatch(r"0|1|0?\.[0-9]{1,6}|[01]\.0{1,6}", text):
        raise HTTPException(400, f"{name}: it is a number from 0 to 1")
    return float(text)


def _mean_direction(features):
    """The normalised mean (D,) of a list of one or two features."""
    between = sum(features)
    length = np.linalg.norm(between)
    return between / length if len(features) > 1 and length else features[0]


def _kind_of(name):
    """The media type by the suffix of a file name, or None."""
    return mimetypes.guess_type(name)[0]


def page_html():
    """page.html with STYLES and SCRIPTS inlined."""
    read = {name: HTML.with_name(name).read_text(encoding="utf-8") for name in (*STYLES, *SCRIPTS)}
    html = HTML.read_text(encoding="utf-8")
    for element, names in (("style", STYLES), ("script", SCRIPTS)):
        html = html.replace(f"<{element}></{element}>", f"<{element}>\n{''.join(map(read.get, names))}</{element}>", 1)
    return html


def _as_json(hit, digest=None):
    return {
        "photo": hit.row, "name": readable(os.path.basename(hit.path)), "path": readable(hit.path),
        "score": hit.score, "distance": hit.distance, "cluster_distance": hit.cluster_distance, "digest": digest,
    }  # fmt: skip


def _chunks(file, size):
    """The first `size` bytes of a file. Raises BrokenResponse if it has become shorter."""
    with file:
        while size:
            if not (chunk := file.read(min(CHUNK, size))):
                raise BrokenResponse
            size -= len(chunk)
            yield chunk


def _missing_photo():
    return HTTPException(404, "this photo does not exist any more; index again to remove it")


def _refuse_without_files(error):
    """Raise HTTPException 503 if `error` was raised since too many files are open, which is no fault of the index."""
    if isinstance(error.__cause__, OSError) and error.__cause__.errno in OUT_OF_FILES:
        raise HTTPException(503, "too many files are open at once; try again") from None


def serve(location, checkpoint=None, device=None, host="127.0.0.1", port=8000, token=None, open_page=False, watch=None):
    """Serve the page of an index, see search.open_index_at, until Ctrl-C, which raises KeyboardInterrupt.

    token: required from clients, and for access from other machines; see `choose_token`. port: 0 for a free one.
    open_page: whether the browser is opened. watch: seconds from one scan for new photos to the next; None for none.
    Raises InputError as `open_searcher` does, for a host that is not an address of this machine, for a port in use, and
    for a token with an index that others can read without it.
    """
    token, shown_token = choose_token(token)
    if host not in LOOPBACK and not token:
        raise InputError(f"--host {host}: others could see your photos there; guard them with --token {AUTO}")
    is_folder = isinstance(location, str | os.PathLike)
    if watch and not is_folder:
        raise InputError("--watch: only an index on disk can be watched; index into Milvus in a process of its own")
    if token and not is_folder and location.is_file:
        raise InputError(
            f"--uri {location.uri}: other users of this machine can read such a file without the token; use an index "
            "on disk, or a Milvus server, or leave the token out"
        )
    with listen(host, port) as listener, sigterm_as_exception():
        reloading = ReloadingIndex(location, checkpoint, device)
        port = listener.getsockname()[1]
        show = show_in_folder if has_desktop() and not token else None  # with a token, the browser may be elsewhere
        server = PageServer(page_config(create_app(reloading, port, token, show=show)))
        own = f"[{host}]" if ":" in host else host
        address = f"http://{own}:{port}/"
        shown = f"{address}?token={shown_token}" if token else address
        print(f"{_described(reloading)}; draw at {shown}", flush=True)
        if open_page and not _open_browser(f"{address}?token={token}" if token else address):
            print("note: no browser can be opened here; open the address yourself", file=sys.stderr)
        with Watcher(reloading, watch, checkpoint, device) if watch else nullcontext():
            server.run(sockets=[listener])


def _described(reloading):
    try:
        index = reloading.latest().searcher.index
    except FirstRunError as error:
        return error
    return f"{index.name}: {len(index):,} photos"


def _open_browser(address):
    """Open `address` in a browser with a window, if there is one. Returns whether that worked."""
    return has_desktop() and webbrowser.open(address)
