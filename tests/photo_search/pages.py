"""A page to test: over photos and a network that cost nothing, and on a real port."""

import base64
import io
import socket
import threading
from contextlib import contextmanager

import numpy as np
import uvicorn
from albums import FakeEncoder
from PIL import Image, ImageDraw
from starlette.testclient import TestClient

from datasets.images import resize, stack
from datasets.prepare.drawings import CATEGORIES
from photo_search import http_server
from photo_search import server as page_server
from photo_search.index import open_index
from photo_search.search import Searcher
from photo_search.server import ReloadingIndex, create_app

PORT = 8000


class PageEncoder(FakeEncoder):
    """A FakeEncoder for drawings, too."""

    def features(self, images):
        return self.embed(stack([resize(image, self.metadata["input_size"]) for image in images]))


def reloading_index_of(folder, monkeypatch):
    """A ReloadingIndex whose network is a PageEncoder."""
    monkeypatch.setattr(page_server, "open_searcher", lambda folder, *_: Searcher(open_index(folder), PageEncoder()))
    return ReloadingIndex(folder)


def visitor(reloading, host=f"127.0.0.1:{PORT}", **more):
    """A client of the page of a ReloadingIndex."""
    return TestClient(create_app(reloading, PORT, **more), base_url=f"http://{host}", follow_redirects=False)


@contextmanager
def served(reloading, **more):
    """Serve a page as the command does; yields its port, which takes connections from the start."""
    with http_server.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(http_server.page_config(create_app(reloading, port, **more)))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield port
        finally:
            server.should_exit = True
            thread.join()


def say(port, parts):
    """Send bytes to a port, a part after the other, and return all that comes back until the other side closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        for part in parts:
            try:
                connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                break
        answer = b""
        try:
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionResetError:
            pass
    return answer


def drawing(form="PNG", side=80, mode="RGB"):
    """A picture of a line, as bytes."""
    image = Image.new("RGB", (side, side), "white")
    scale = side / 80
    line = [(scale * x, scale * y) for x, y in ((10, 10), (70, 40), (20, 70))]
    ImageDraw.Draw(image).line(line, fill="black", width=round(3 * scale))
    file = io.BytesIO()
    image.convert(mode).save(file, form)
    return file.getvalue()


EXAMPLES = ("bicycle", "cup", "flower", "house", "sailboat", "umbrella")  # of the page, to begin with


def packed(name, width=18):
    """A category's drawing as the page has it: strokes as in a link, not compressed, in base64."""
    content = bytearray([2])

    def put(value):
        while value > 127:
            content.append(value & 127 | 128)
            value >>= 7
        content.append(value)

    for points, closed in CATEGORIES[name](np.random.default_rng(1)):
        points = np.vstack([points, points[:1]]) if closed else points
        points = (1023 * (0.5 + 0.38 * points)).round().astype(int)
        put(4 * width)
        put(len(points))
        for by in np.diff(points, axis=0, prepend=[[0, 0]]).ravel().tolist():
            put(-2 * by - 1 if by < 0 else 2 * by)
    return base64.urlsafe_b64encode(content).decode().rstrip("=")
