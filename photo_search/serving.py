"""The drawing page on a port of this machine."""

import errno
import os
import re
import socket

import uvicorn

from photo_search.access import LOOPBACK
from photo_search.server import ReloadingIndex, create_app
from utils.cli import InputError

MIN_TOKEN_LENGTH = 8  # characters of a token
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
